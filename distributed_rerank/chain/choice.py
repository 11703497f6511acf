"""Which chain to use, decided by labels set aside from `train`. Layer 3.

Steps are tried one after the other: first fusion of the logits with the first-stage distances,
then neighbourhoods and query expansion on what came out. A step joins the chain only if its gain holds on labels that
its constants were not chosen on: the set-aside labels are halved, the best constants of either half are measured on
the other, and the interval of the gain over what the chain had before must lie above zero. Otherwise the chain stays
as it was; with no step at all it is the first stage, and the log says so.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.evidence import CMC_WEIGHT, Evidence, Trial, half_of_labels, try_chain
from distributed_rerank.chain.probability import calibrate
from distributed_rerank.chain.trials import Settings, fusion_settings, fusion_trials, neighbour_settings
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.metrics import PerQuery

logger = logging.getLogger(__name__)

MAX_P_VALUE = 0.01
"""Of a gain that is believed: several steps are tried, so chance has several tries too."""
MIN_GAIN = 0.005
"""A smaller gain of the objective is not worth a step, even if it is real."""
CLEARLY_BETTER = 0.005
"""Of mAP@10 + CMC@1: by how much more weight of the first stage must win. The models that are judged have seen fewer
labels than the one that is kept, and lean on the first stage more than it has to."""

Gain = dict[str, statistics.Difference]


def fusion_figure(evidence: Evidence) -> dict[str, float]:
    """Figures of the best fusion, for early stopping: what the model would be worth if training ended now."""
    return max((trial.figures() for trial in fusion_trials(evidence)), key=lambda figures: figures["map@10"])


def choose(evidence: Evidence, seed: int = 0) -> Chain:
    """The chain for these labels, with the figures of every setting tried in `chosen_on` and a calibration.

    Without logits only the steps that need no training are tried.
    """
    labels = evidence.query_labels()
    is_first_half = half_of_labels(labels, seed)
    first_stage = current = try_chain(evidence, Chain())
    table = [row(current.chain, current.values)]
    decisions = []
    for name in ("pairwise", "neighbours"):
        settings = settings_for(name, evidence, current, is_first_half)
        if settings is None:
            continue
        pick = smallest_best_weight if name == "pairwise" else best
        table += [row(chain, values) for chain, values in zip(settings.chains, settings.values, strict=True)]
        values = cross_fitted_values(settings, first_stage, is_first_half, pick)
        gain = statistics.compare({key: current.values[key] for key in values}, values, labels, seed=seed)
        is_taken = is_significant(gain, first_stage, values)
        decisions.append({"step": name, "taken": is_taken, "gain": {key: spelled(d) for key, d in gain.items()}})
        if is_taken:
            everyone = torch.ones_like(is_first_half)
            current = try_chain(evidence, settings.chains[pick(settings.values, first_stage, everyone)])
    log_choice(current, decisions)
    chosen_on = {
        "n_labels": len(labels.unique()),
        "n_queries": len(labels),
        "first_stage": {key: table[0][key] for key in ("map@10", "cmc@1")},
        "chosen": current.figures(),
        "decisions": decisions,
        "table": table,
    }
    return replace(current.chain, chosen_on=chosen_on, calibration=calibrate(evidence, current, is_first_half))


def settings_for(
    name: str, evidence: Evidence, current: Trial, is_first_half: Bool[Tensor, " query"]
) -> Settings | None:
    """What is tried as the next step; None where nothing can be."""
    if bool(is_first_half.all()) or not bool(is_first_half.any()):
        return None
    if name == "pairwise":
        return None if evidence.logits is None else fusion_settings(evidence)
    return neighbour_settings(evidence, current, is_first_half)


def without_cmc_loss(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> list[int]:
    """Numbers of the settings with no lower CMC@1 than the first stage on these queries; all, where none has."""
    floor = float(first_stage.values["cmc@1"][rows].mean())
    found = [number for number, value in enumerate(values) if float(value["cmc@1"][rows].mean()) >= floor]
    return found or list(range(len(values)))


def best(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> int:
    """Number of the setting without a loss of CMC@1 of the largest objective on these queries."""
    return max(
        without_cmc_loss(values, first_stage, rows), key=lambda number: float(values[number]["objective"][rows].mean())
    )


def smallest_best_weight(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> int:
    """Number of the setting of the largest mAP@10 + CMC@1 without a loss of CMC@1; a later one must be clearly
    better."""
    chosen, figure = -1, -1.0
    for number in without_cmc_loss(values, first_stage, rows):
        found = float((values[number]["map@10"][rows] + values[number]["cmc@1"][rows]).mean())
        if chosen < 0 or found > figure + CLEARLY_BETTER:
            chosen, figure = number, found
    return chosen


def cross_fitted_values(
    settings: Settings, first_stage: Trial, is_first_half: Bool[Tensor, " query"], pick: Any
) -> PerQuery:
    """Values of each query with all constants from the half of the labels without its own."""
    values = {key: column.clone() for key, column in first_stage.values.items()}
    for is_first in (True, False):
        chosen_on = is_first_half == is_first
        found = settings.measure(pick(settings.values, first_stage, chosen_on), is_first)
        for key in values:
            values[key][~chosen_on] = found[key][~chosen_on]
    return values


def is_significant(gain: Gain, first_stage: Trial, values: PerQuery) -> bool:
    """Whether the objective rose beyond noise and by something that matters, mAP@10 did not fall, and CMC@1 is not
    below the first stage's."""
    rise = gain["objective"]
    is_real = rise.low > 0 and rise.p_value < MAX_P_VALUE and rise.mean >= MIN_GAIN and gain["map@10"].mean >= 0
    return is_real and float((values["cmc@1"] - first_stage.values["cmc@1"]).mean()) >= 0


def row(chain: Chain, values: PerQuery) -> dict[str, Any]:
    """One line of the table of choices."""
    return {"chain": chain.describe(), **{key: float(values[key].mean()) for key in ("map@10", "cmc@1")}}


def spelled(difference: statistics.Difference) -> dict[str, Any]:
    """A difference as chain.json spells it."""
    return {
        "mean": difference.mean,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
    }


def outcome(decision: dict[str, Any]) -> str:
    """Whether the step was taken; of a gain that chance may have made, how likely that is."""
    p_value = decision["gain"]["objective"]["p_value"]
    if decision["taken"] or p_value < MAX_P_VALUE:
        return "taken" if decision["taken"] else "not taken"
    return (
        f"not taken, for mAP@10 + {CMC_WEIGHT:g} CMC@1 may rise so by chance (p {p_value:.3f}, not below {MAX_P_VALUE})"
    )


def log_choice(chosen: Trial, decisions: Sequence[dict[str, Any]]) -> None:
    """One line for each step tried and one for the outcome."""
    for decision in decisions:
        gain = decision["gain"]
        logger.info(
            "%s: mAP@10 %+.4f [%+.4f, %+.4f], CMC@1 %+.4f [%+.4f, %+.4f] on set-aside labels: %s",
            decision["step"], gain["map@10"]["mean"], *gain["map@10"]["ci95"], gain["cmc@1"]["mean"],
            *gain["cmc@1"]["ci95"], outcome(decision),
        )  # fmt: skip
    if not chosen.chain.steps:
        logger.info("no step improves the set-aside labels beyond noise: the chain is the first stage alone")
    else:
        logger.info("chosen chain: %s", chosen.chain.describe())
