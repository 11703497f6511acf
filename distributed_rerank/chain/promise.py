"""What the labels set aside in training promise of the whole chain, and whether other queries keep it.

A gain in points does not carry over: the labels set aside are ranked among fewer others than a real gallery holds, so
the first stage misses less there, and less can be gained. So each chain step keeps its gain as a line over the value
before it, fitted to single queries by models and constants that had not seen their labels. The promise for other
queries is that of the lines one after the other, from their own first stage on. How far the lines move a gain is an
error of the promise too: a first stage that is worse on other queries leaves more to gain if their lists are harder,
but not if it is an extractor that has seen the labels set aside.

Images that the extractor has seen may stand among the candidates, and none of them matches. A model can gain by telling
seen images from unseen ones, but other galleries have no seen images. So the lines are those of the same lists without
them.

The promise is made for labels of which the model has seen no look-alikes: queries that have some among the train labels
may show more. So may others where labels are halved, for models that saw half of them were measured, and the one that
is kept has seen all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.evidence import AMONG_UNSEEN
from distributed_rerank.tensors.gain_line import GainLine
from distributed_rerank.tensors.statistics import Interval


class PromisedGain(NamedTuple):
    """A promised gain beside the gain of other queries, in units of the metric."""

    promised: float
    ci95: list[float]
    """Where 95 % of such query sets lie: the promise is uncertain, and so is what a sample of labels shows of it."""
    shown: float
    outcome: str
    """kept; or less or more, outside that interval."""


def promise_of(chain: Chain) -> dict[str, Any]:
    """The lines of the steps taken, for chain.json: `chain` names the chain, `lines` has those of each metric.

    `among_unseen`: whether candidates that the extractor has seen were taken out of the lists. {} where no step was
    taken.
    """
    on = chain.chosen_on
    taken = [decision for decision in (on.get("adapt"), *on.get("decisions", ())) if decision and decision["taken"]]
    if chain.is_judged_as_one:
        taken = [on["together"]]  # steps that were judged as one are promised as one
    if not taken:
        return {}
    has_seen = any(key.endswith(AMONG_UNSEEN) for key in taken[0]["lines"])
    lines = {
        key: [promised_line(key, decision["lines"]) for decision in taken]
        for key in taken[0]["lines"]
        if not key.endswith(AMONG_UNSEEN)
    }
    kept = {key: of_steps for key, of_steps in lines.items() if all(of_steps)}
    return {"chain": chain.describe(), "among_unseen": has_seen, "lines": kept}


def promised_line(key: str, lines: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line of a step's gain to promise: that among unseen candidates, where there are seen ones too.

    A step that pins the first candidates changes no CMC@1 in any gallery, but behind a seen first candidate the first
    unseen one may change. So what has changed in no list is promised no change.
    """
    whole, unseen = lines[key], lines.get(f"{key}{AMONG_UNSEEN}")
    if whole is None or unseen is None:
        return whole
    has_changed_nothing = whole["gain"] == 0 and whole["gain_variance"] == 0
    return whole | {"before": unseen["before"]} if has_changed_nothing else unseen


def gain_for(lines: Sequence[GainLine], before: float) -> Interval:
    """The gain of steps one after the other where the first finds `before`; no value leaves [0, 1].

    The errors of the steps are taken to be independent. What the lines add to the gain of their own queries, or take
    from it, is an error of that size.
    """
    value, variance, moved = before, 0.0, 0.0
    for line in lines:
        gain = line.at(value)
        moved += gain.mean - line.gain
        # An error so far moves the value that the step finds, and with it the step's own gain.
        variance = variance * (1 + line.slope) ** 2 + ((gain.high - gain.low) / 2) ** 2
        value = min(1.0, max(0.0, value + gain.mean))
    mean, half = value - before, math.hypot(math.sqrt(variance), moved)
    return Interval(mean, mean - half, min(1 - before, mean + half))


def lines_of(promise: Mapping[str, Any]) -> dict[str, list[GainLine]]:
    """The lines of each metric, as a chain.json has them."""
    return {key: [GainLine(**line) for line in lines] for key, lines in promise.get("lines", {}).items()}


def promise_in_words(promise: Mapping[str, Any]) -> str:
    """The promise for a first stage like that of the labels set aside, for a log and the model card; "" for none."""
    names, parts = {"map@10": "mAP@10", "cmc@1": "CMC@1"}, []
    for key, lines in lines_of(promise).items():
        gain = gain_for(lines, lines[0].before)
        name, before = names.get(key, key), lines[0].before
        parts.append(f"{name} {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] where it has {before:.4f}")
    among = ", among photos that the extractor has not seen" if promise.get("among_unseen") else ""
    return f"the chain adds to the first stage {', '.join(parts)}{among}" if parts else ""


def compare_with_promise(
    chain: Chain, first_stage: Mapping[str, float], difference: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Each metric's gain promised for this first stage, beside the difference shown, for metrics.json.

    {} where nothing was promised, or of another chain.
    """
    promise = chain.chosen_on.get("promise", {})
    if promise.get("chain") != chain.describe():
        return {}
    return {
        key: compare_gain(gain_for(lines, first_stage[key]), difference[key])._asdict()
        for key, lines in lines_of(promise).items()
        if key in difference
    }


def compare_gain(promised: Interval, shown: Mapping[str, Any]) -> PromisedGain:
    """One metric's promise, and whether the shown gain, a difference of metrics.json, keeps it."""
    low, high = shown["ci95"]
    mean, half = promised.mean, math.hypot((promised.high - promised.low) / 2, (high - low) / 2)
    change = shown["mean"] - mean
    outcome = "kept" if abs(change) <= half else "less" if change < 0 else "more"
    return PromisedGain(mean, [mean - half, mean + half], shown["mean"], outcome)
