"""The decision about a chain step: its gain on labels that it has not seen, how probable one is, and why it is taken.

A decision is a dictionary as chain.json holds it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import NormalDist
from typing import Any

from jaxtyping import Float64, Int64
from torch import Tensor

from distributed_rerank.chain.evidence import AMONG_UNSEEN, CMC_WEIGHT
from distributed_rerank.chain.trials import Trial
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.gain_line import GainLine, gain_line
from distributed_rerank.tensors.metrics import PerQuery

logger = logging.getLogger(__name__)

ACCEPT = 0.995
"""A chain step joins where its gain is so probable; high, for several are tried, and nobody may be harmed."""
LIKELY = 0.9
"""A step with a gain so probable may join with others, if the chain of them all is sure."""
PRIOR_SPREAD, PRIOR_LABELS = 0.06, 2
"""What is assumed of the spread of a gain between labels before any is seen: as if two labels had shown 6 points."""
LEAST_SPREAD = 1e-3
"""Of that assumption, where hardly any room is left for a gain."""
MIN_GAIN = 0.005
"""A smaller gain of the objective is not worth a chain step, even if it is real."""
ON_ALL_LABELS, WITHOUT_ADAPTER = ", on all train labels", ", without the adapter"
"""Ends the name of a step that was tried there."""


def judge(
    name: str,
    before: PerQuery,
    after: PerQuery,
    first_stage: Trial,
    labels: Int64[Tensor, " query"],
    seed: int,
    accept: float,
    *,
    counts_map: bool = False,
    families: Int64[Tensor, " query"] | None = None,
) -> dict[str, Any]:
    """The decision about a chain step, for chain.json: its gain, how probable one is, and whether it is taken.

    Taken where the objective rises with probability `accept` and by enough to matter; neither may mAP@10 have fallen,
    nor CMC@1 be below the first stage's. Where mAP@10 counts, its own gain is enough if CMC@1 has not fallen: CMC@1
    varies so much between labels that it would hide a gain of mAP@10. Where some candidates are seen, a model can gain
    by sending those back alone, so mAP@10 may not fall among the unseen ones either. The lines' errors are those
    between `families`, look-alike labels in one: new queries are of other families. None = between labels.
    """
    gain = statistics.compare({key: before[key] for key in after}, after, labels, seed=seed)
    probability = probability_of_gain(after["objective"] - before["objective"], labels)
    if counts_map and gain["cmc@1"].mean >= 0:
        room = 1 - float(before["map@10"].mean())
        probability = max(probability, probability_of_gain(after["map@10"] - before["map@10"], labels, room))
    of_map = [gain[key].mean for key in ("map@10", f"map@10{AMONG_UNSEEN}") if key in gain]
    is_harmless = min(of_map) >= 0 and float((after["cmc@1"] - first_stage.values["cmc@1"]).mean()) >= 0
    return {
        "step": name,
        "taken": probability >= accept and gain["objective"].mean >= MIN_GAIN and is_harmless,
        "is_harmless": is_harmless,
        "probability": probability,
        "accept": accept,
        "gain": {key: gain_to_json(difference) for key, difference in gain.items()},
        "lines": gain_lines(before, after, labels if families is None else families),
        "n_labels": len(labels.unique()),
    }


def probability_of_gain(
    gain: Float64[Tensor, " query"], labels: Int64[Tensor, " query"], room: float = PRIOR_SPREAD
) -> float:
    """That the mean gain is above 0, with the module's prior for few labels.

    Gains do not spread further than the `room` that is left for them: where a figure is nearly 1, small ones count.
    """
    return statistics.probability_of_gain(
        gain, labels, prior_spread=min(PRIOR_SPREAD, max(room, LEAST_SPREAD)), prior_clusters=PRIOR_LABELS
    )


def is_likely(decision: dict[str, Any]) -> bool:
    """Whether a step gains with the probability `LIKELY`, and harms nothing."""
    is_enough = decision["gain"]["objective"]["mean"] >= MIN_GAIN and decision["is_harmless"]
    return decision["probability"] >= min(decision["accept"], LIKELY) and is_enough


def gain_lines(before: PerQuery, after: PerQuery, clusters: Int64[Tensor, " query"]) -> dict[str, Any]:
    """The line of each metric's gain over its value before, as chain.json holds it."""
    return {key: line_to_json(gain_line(before[key], after[key], clusters)) for key in after if key != "objective"}


def gain_to_json(difference: statistics.Difference) -> dict[str, Any]:
    """A difference as chain.json holds it."""
    return {
        "mean": difference.mean,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
    }


def line_to_json(line: GainLine | None) -> dict[str, Any] | None:
    """A gain over the value before as chain.json holds it; None for a single label."""
    return None if line is None else asdict(line)


def outcome(decision: dict[str, Any]) -> str:
    """Whether the chain step was taken, how sure its gain is, and what would change a decision against it."""
    probability, accept, mean = decision["probability"], decision["accept"], decision["gain"]["objective"]["mean"]
    if decision.get("as_one"):
        return f"judged as one with other steps; by itself it gains with a probability of {probability:.1%}"
    if decision["taken"]:
        asked = f"--accept {accept:g}"
        if "option" in decision:
            asked = f"--accept {decision['option']:g} asks for {100 * accept:g}% of steps as one"
        return f"taken, for it gains with a probability of {probability:.1%} ({asked})"
    if mean < MIN_GAIN:
        return f"not taken, for mAP@10 + {CMC_WEIGHT:g} CMC@1 does not rise by {MIN_GAIN:g}"
    if "pinned_gain" in decision:
        return "not taken, for CMC@1 does not surely rise, and behind the first candidate too little is gained"
    if probability >= accept:
        unseen = decision["gain"].get(f"map@10{AMONG_UNSEEN}", {"mean": 0.0})["mean"]
        return f"not taken, for mAP@10{' among unseen photos' if unseen < 0 else ' or CMC@1'} would fall"
    at_least = math.floor(1000 * probability) / 10  # rounded up, it could read as if it were enough
    of_steps = " of steps as one" if "option" in decision else ""
    return (
        f"not taken, for it gains with a probability of {at_least:.1f}% only, where --accept asks for {100 * accept:g}%"
        f"{of_steps}; with the same gain about {labels_needed(decision)} labels would do instead of "
        f"{decision['n_labels']}"
    )


def labels_needed(decision: dict[str, Any]) -> int:
    """The number of labels with which a gain of this size and spread between labels would be sure enough."""
    wanted = NormalDist().inv_cdf(min(decision["accept"], 0.9999))
    found = NormalDist().inv_cdf(min(max(decision["probability"], 0.51), 0.9999))
    return math.ceil(decision["n_labels"] * (wanted / found) ** 2)


def log_decisions(decisions: Sequence[dict[str, Any]]) -> None:
    """One line for each chain step tried."""
    for decision in decisions:
        gain, where = decision["gain"], "" if decision["step"].endswith(ON_ALL_LABELS) else " on set-aside labels"
        logger.info(
            "%s: mAP@10 %+.4f [%+.4f, %+.4f], CMC@1 %+.4f [%+.4f, %+.4f]%s: %s",
            decision["step"], gain["map@10"]["mean"], *gain["map@10"]["ci95"], gain["cmc@1"]["mean"],
            *gain["cmc@1"]["ci95"], where, outcome(decision),
        )  # fmt: skip
