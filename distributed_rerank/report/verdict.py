"""The outcome in words: first for someone who does not know the metrics, then for someone who does.

Both come from the same figures: what the first place shows (CMC@1), what the first places show (precision), mAP@10 with
its 95 % interval.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed_rerank.report.baselines import Best, baseline_name, best_without_pairwise
from distributed_rerank.report.formatting import fraction, in_table_order, interval, metric_name, percent, signed

LOW_CEILING = 0.8
"""Below this share of queries whose right item is among the candidates, more candidates come before a better order."""


class Verdict(NamedTuple):
    """What the report and the log say first."""

    tone: str
    """good, bad, open (undecided or mixed) or plain (nothing compared)."""
    plain: str
    """Without terms."""
    sentence: str
    """With mAP@10 and its interval."""
    detail: str
    """What else to know."""
    next_step: str
    """What to try now."""


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Whether re-ranking helped, by mAP@10 and its 95 % interval, and how much more was possible.

    A baseline without the trained pairwise model that is better beyond chance comes first. Where mAP@10 rises but CMC@1
    falls beyond chance, or most metrics fall, the outcome is mixed and not good. What training found out about the
    evidence for its chain comes last.
    """
    found = verdict_of_figures(metrics)
    if not metrics.get("evidence"):
        return found
    return found._replace(detail=f"{found.detail} About the chain: {metrics['evidence']}.")


def verdict_of_figures(metrics: Mapping[str, Any]) -> Verdict:
    """The verdict by the figures alone."""
    first, best = metrics["first_stage"], best_without_pairwise(metrics)
    best_text = "" if best is None else f" {_best_text(best)}"
    if not metrics.get("reranked"):
        cmc = f", CMC@1 {fraction(first['cmc@1'])}" if "cmc@1" in first else ""
        sentence = f"First stage alone: mAP@10 is {fraction(first['map@10'])}{cmc}."
        detail = f"No pairwise model was applied.{best_text}"
        return Verdict("plain", _first_stage_in_plain_words(first), sentence, detail, "Train a pairwise model.")
    before, after = first["map@10"], metrics["reranked"]["map@10"]
    tone, claim = _claim(metrics["difference"])
    compared = metrics["difference"]["map@10"]
    change = compared["mean"]
    moved = f"{'rises' if change > 0 else 'falls'} from {fraction(before)} to {fraction(after)}"
    moved = moved if change else f"stays at {fraction(after)}"
    sentence = f"{claim}: mAP@10 {moved} ({signed(change)}; 95 % interval {interval(compared)})."
    plain, detail = in_plain_words(metrics), _detail(metrics, before, after) + _added_to_adapted(metrics)
    detail += _against_promise(metrics)
    if best is not None and best.beats:
        step = f"Leave this chain out and use what is better: {baseline_name(best.name)}."
        return Verdict("bad", plain, _beaten(best, after), f"{sentence} {detail}", step)
    return Verdict(tone, plain, sentence, f"{detail}{best_text}", _next_step(metrics, tone))


def ship_or_wait_in_words(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that would settle an open question: more queries, wrong labels."""
    found, sentences = metrics.get("ship_or_wait") or {}, []
    for key, n in found.get("more_queries", {}).items():
        name = metric_name(key)
        if n is None:
            sentences.append(f"{name} does not change, and no number of queries would show a gain.")
            continue
        sentences.append(
            f"The change of {name} may be chance. If it is as large as it looks, some {n:,} more labelled queries "
            "would show it, with as many a label. Of unlabelled queries `rerank` names the 50 to label first: "
            "label_next.csv."
        )
    wrong = found.get("if_suspects_are_wrong")
    if wrong:
        final = metrics.get("reranked") or metrics["first_stage"]
        for key in (key for key in wrong if key != "n_labels"):
            low, high = (fraction(end) for end in wrong[key]["ci95"])
            sentences.append(
                f"{metric_name(key)} is {fraction(final[key])}, or {fraction(wrong[key]['mean'])} [{low}, {high}] if "
                f"{wrong['n_labels']} labels to check (below) are wrong."
            )
    return sentences


def in_plain_words(metrics: Mapping[str, Any]) -> str:
    """What a person sees before and after: which item comes first, and how many of the first ones are right."""
    first, last, compared = metrics["first_stage"], metrics["reranked"], metrics["difference"]
    if "cmc@1" not in first:
        return ""
    now, then = _of_hundred(last["cmc@1"], first["cmc@1"])
    low, high = compared["cmc@1"]["ci95"]
    if last["cmc@1"] == first["cmc@1"]:
        text = f"The right item comes first for {now} of 100 queries, as without re-ranking"
    else:
        chance = ", which may be chance" if low <= 0 <= high else ""
        text = f"The right item comes first for {now} of 100 queries instead of {then}{chance}"
    cutoffs = [key.removeprefix("precision@") for key in first if key.startswith("precision@")]
    shown = max((int(cutoff) for cutoff in cutoffs if cutoff.isdigit()), default=0)
    if shown > 1:
        right, were = (f"{shown * side[f'precision@{shown}']:.1f}" for side in (last, first))
        text += f"; of {shown} shown, {right} are right" + ("" if right == were else f" instead of {were}")
    return f"{text}."


def _first_stage_in_plain_words(first: Mapping[str, float]) -> str:
    if "cmc@1" not in first:
        return ""
    return f"The right item comes first for {_of_hundred(first['cmc@1'])[0]} of 100 queries."


def _of_hundred(*shares: float) -> list[str]:
    """Shares as counts of 100; with a decimal where whole numbers would hide a difference."""
    whole = [f"{100 * share:.0f}" for share in shares]
    return whole if len(set(whole)) == len(set(shares)) else [f"{100 * share:.1f}" for share in shares]


def _claim(difference: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Tone and claim from the differences of all metrics."""
    low, high = difference["map@10"]["ci95"]
    if high < 0:
        return "bad", "Re-ranking makes the order worse"
    if low <= 0:
        return "open", "Re-ranking makes no difference that these queries can show"
    n_falling = sum(compared["mean"] < 0 for compared in difference.values())
    if ("cmc@1" in difference and difference["cmc@1"]["ci95"][1] < 0) or 2 * n_falling > len(difference):
        return "open", "Re-ranking helps some metrics and harms others"
    return "good", "Re-ranking helps"


def _next_step(metrics: Mapping[str, Any], tone: str) -> str:
    """The step that the figures suggest."""
    ceiling, last = metrics["oracle"].get("cmc@1"), metrics["reranked"].get("cmc@1")
    if ceiling is not None and ceiling < LOW_CEILING:
        n = _of_hundred(ceiling)[0]
        return (
            f"The right item is among the candidates for only {n} of 100 queries: give more candidates (--top-n), or a "
            "better extractor."
        )
    if tone in ("bad", "open"):
        return "Do not use this chain yet: train on more labels, or on labels like those of these queries."
    if ceiling is not None and last is not None and ceiling - last > 0.1:
        return "There is room left: more training labels, or a larger pairwise model."
    return "Use it; choose how sure a match must be in the table of thresholds."


def _added_to_adapted(metrics: Mapping[str, Any]) -> str:
    """What the rest of the chain adds to the adapted first stage; "" where the chain adapts nothing."""
    adapted = (metrics.get("baselines") or {}).get("adapted", {})
    if "against_reranked" not in adapted:
        return ""
    against, value = adapted["against_reranked"]["map@10"], fraction(adapted["metrics"]["map@10"])
    low, high = sorted(-end for end in against["ci95"])
    return (
        f" The adapted first stage alone has mAP@10 {value}; what follows adds {signed(-against['mean'])} "
        f"({interval({'ci95': [low, high]})})."
    )


PROMISES = {
    "kept": "as promised",
    "less": "less than promised: these queries may differ from the labels set aside",
    "more": "more than promised",
}


def _against_promise(metrics: Mapping[str, Any]) -> str:
    """What the labels set aside in training promised for a first stage like this one; "" without a promise."""
    found = (metrics.get("promise") or {}).get("map@10")
    if found is None:
        return ""
    return (
        f" The labels set aside in training promised mAP@10 {signed(found['promised'])} (such queries show "
        f"{interval(found)}); {signed(found['shown'])} is {PROMISES[found['outcome']]}."
    )


def _beaten(best: Best, after: float) -> str:
    against = best.figures["against_reranked"]["map@10"]
    name, value = baseline_name(best.name), fraction(best.figures["metrics"]["map@10"])
    return (
        f"{name}, which needs no trained head, is better than this chain: mAP@10 {value} against {fraction(after)} "
        f"({signed(against['mean'])}; 95 % interval {interval(against)})."
    )


def _best_text(best: Best) -> str:
    change = best.figures["difference"]["map@10"]
    value = fraction(best.figures["metrics"]["map@10"])
    claim = (
        "Best without the trained head" if change["mean"] > 0 else "Nothing is gained without the trained head; at best"
    )
    return f"{claim}: {baseline_name(best.name)}, mAP@10 {value} ({signed(change['mean'])}; {interval(change)})."


def _detail(metrics: Mapping[str, Any], before: float, after: float) -> str:
    """What CMC@1 did, and what a perfect re-ranker would have reached."""
    ceiling = metrics["oracle"]["map@10"]
    detail = f"A perfect re-ranker of the same candidates would reach mAP@10 {fraction(ceiling)}"
    if ceiling > before and after > before:
        detail += f"; {percent((after - before) / (ceiling - before))} of that headroom is captured"
    if "cmc@1" in metrics["first_stage"]:
        first, last = metrics["first_stage"]["cmc@1"], metrics["reranked"]["cmc@1"]
        detail = f"CMC@1 goes from {fraction(first)} to {fraction(last)}. {detail}"
    changes = metrics["difference"]
    falling = [metric_name(key) for key in in_table_order(changes) if changes[key]["mean"] < 0]
    lower = f" Lower than before: {', '.join(falling)}." if falling and after > before else ""
    return f"{detail}.{lower}"
