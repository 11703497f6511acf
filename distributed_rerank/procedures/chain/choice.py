"""Which chain to use, decided by labels set aside from `train`. Layer 3.

Steps are tried one after the other. A step joins the chain only if its gain holds on labels that its
constants were not chosen on: the set-aside labels are halved, the best constants of either half are measured
on the other, and the interval of the gain over what the chain had before must lie above zero. Otherwise the
chain stays as it was; with no step at all it is the first stage, and the log says so.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.procedures.chain.apply import apply, apply_pairwise
from distributed_rerank.procedures.chain.chain import Chain, KReciprocalStep, PairwiseStep
from distributed_rerank.tensors import calibration, metrics, statistics
from distributed_rerank.tensors.knn import Neighbours
from distributed_rerank.tensors.metrics import PerQuery

logger = logging.getLogger(__name__)

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the first-stage distance beside the logit; the larger, the more the first stage counts."""
K_RECIPROCAL = ((5, 2, 0.3), (5, 2, 0.5), (10, 3, 0.3), (10, 3, 0.5), (20, 6, 0.3), (20, 6, 0.5))
"""(k1, k2, weight) tried."""

MAX_P_VALUE = 0.01
"""Of a gain that is believed: several steps are tried, so chance has several tries too."""
MIN_GAIN = 0.005
"""A smaller gain of mAP@10 is not worth a step, even if it is real."""

Gain = dict[str, statistics.Difference]


@dataclass(frozen=True)
class Evidence:
    """What a choice is made on: the lists of all images of the set-aside labels, numbered 0, 1, ..."""

    lists: Neighbours
    labels: Int64[Tensor, " item"]
    n_relevant: Int64[Tensor, " item"]
    """Relevant items of each; items with none are in the lists of others but are no queries."""
    logits: Float[Tensor, "item top_n"] | None = None
    embeddings: Float[Tensor, "item dim"] | None = None

    def per_query(self, lists: Neighbours) -> PerQuery:
        """Metrics of the items that have relevant ones, in item order."""
        rows = self.n_relevant > 0
        is_relevant = metrics.relevance(lists.items[rows], self.labels[rows], self.labels)
        return metrics.per_query(is_relevant, self.n_relevant[rows], (1, 10))

    def query_labels(self) -> Int64[Tensor, " query"]:
        """Labels of the items that are measured."""
        return self.labels[self.n_relevant > 0]


@dataclass(frozen=True)
class Trial:
    """A chain and how each query fared with it."""

    chain: Chain
    values: PerQuery
    lists: Neighbours = field(repr=False)

    def figures(self) -> dict[str, float]:
        """Mean mAP@10 and CMC@1."""
        return {key: float(self.values[key].mean()) for key in ("map@10", "cmc@1")}


def try_chain(evidence: Evidence, chain: Chain) -> Trial:
    """Measures one chain."""
    lists = apply(chain, evidence.lists, evidence.logits, evidence.embeddings)
    return Trial(chain, evidence.per_query(lists), lists)


def fusion_trials(evidence: Evidence) -> list[Trial]:
    """Every way of fusing the logits with the first stage's distances, and the logits alone."""
    assert evidence.logits is not None, "fusing needs logits"
    top_n = evidence.logits.shape[1]
    steps = [PairwiseStep(top_n, "fuse", weight, logit_scale(evidence)) for weight in WEIGHTS]
    return [try_chain(evidence, Chain((step,))) for step in steps]


def logit_scale(evidence: Evidence) -> float:
    """Temperature that gives the logits the spread of the distances, so that one grid of weights suits every
    model."""
    assert evidence.logits is not None, "a scale needs logits"
    head = evidence.lists.distances[:, : evidence.logits.shape[1]]
    is_there = evidence.logits.isfinite() & head.isfinite()
    if int(is_there.sum()) < 2:
        return 1.0
    spread = float(evidence.logits[is_there].double().std()) / max(1e-12, float(head[is_there].double().std()))
    return spread if spread > 1e-6 else 1.0


def fusion_figure(evidence: Evidence) -> dict[str, float]:
    """Figures of the best fusion, for early stopping: what the model would be worth if training ended now."""
    return max((trial.figures() for trial in fusion_trials(evidence)), key=lambda figures: figures["map@10"])


def k_reciprocal_trials(evidence: Evidence, before: Trial) -> list[Trial]:
    """k-reciprocal re-ranking on top of a chain, with all constants that the lists are long enough for."""
    longest = before.lists.items.shape[1]
    steps = [KReciprocalStep(k1, k2, weight) for k1, k2, weight in K_RECIPROCAL if k1 <= longest]
    return [try_chain(evidence, Chain((*before.chain.steps, step))) for step in steps]


def best_of(trials: Sequence[Trial], first_stage: Trial, rows: Tensor) -> Trial:
    """The trial of largest mAP@10 on these queries, among those with no lower CMC@1 than the first stage if
    any."""

    def mean(trial: Trial, key: str) -> float:
        return float(trial.values[key][rows].mean())

    harmless = [trial for trial in trials if mean(trial, "cmc@1") >= mean(first_stage, "cmc@1")]
    return max(harmless or trials, key=lambda trial: mean(trial, "map@10"))


def held_out_values(
    trials: Sequence[Trial], first_stage: Trial, labels: Int64[Tensor, " query"], seed: int
) -> PerQuery:
    """mAP@10 and CMC@1 of each query with the constants that the half of the labels without its own chose."""
    known = np.random.default_rng([seed, 0xC4A]).permutation(np.unique(labels.numpy()))
    is_first = torch.from_numpy(np.isin(labels.numpy(), known[: len(known) // 2]))
    values = {key: first_stage.values[key].clone() for key in ("map@10", "cmc@1")}
    for measured in (is_first, ~is_first):
        if measured.any() and (~measured).any():
            chosen = best_of(trials, first_stage, ~measured)
            for key in values:
                values[key][measured] = chosen.values[key][measured]
    return values


def gain_over(before: Trial, values: PerQuery, labels: Int64[Tensor, " query"], seed: int) -> Gain:
    """The paired differences to a trial, clustered by label."""
    return statistics.compare({key: before.values[key] for key in values}, values, labels, seed=seed)


def is_believed(gain: Gain, over_first_stage: Gain) -> bool:
    """Whether mAP@10 rose beyond noise and by something that matters, and CMC@1 is not below the first
    stage's."""
    rise = gain["map@10"]
    return rise.low > 0 and rise.p_value < MAX_P_VALUE and rise.mean >= MIN_GAIN and over_first_stage["cmc@1"].mean >= 0


def choose(evidence: Evidence, seed: int = 0) -> Chain:
    """The chain for these labels, with the figures of every setting tried in `chosen_on` and a calibration.

    Without logits only the steps that need no training are tried.
    """
    labels = evidence.query_labels()
    first_stage = current = try_chain(evidence, Chain())
    table = [row(current)]
    decisions = []
    for name in ("pairwise", "k_reciprocal"):
        if name == "pairwise" and evidence.logits is None:
            continue
        trials = fusion_trials(evidence) if name == "pairwise" else k_reciprocal_trials(evidence, current)
        if not trials:
            continue
        table += [row(trial) for trial in trials]
        values = held_out_values(trials, first_stage, labels, seed)
        gain = gain_over(current, values, labels, seed)
        best = best_of(trials, first_stage, torch.ones(len(labels), dtype=torch.bool))
        is_taken = is_believed(gain, gain_over(first_stage, values, labels, seed))
        decisions.append({"step": name, "taken": is_taken, "gain": {key: spelled(d) for key, d in gain.items()}})
        current = best if is_taken else current
    log_choice(current, decisions)
    chosen_on = {
        "n_labels": len(labels.unique()),
        "n_queries": len(labels),
        "first_stage": {key: table[0][key] for key in ("map@10", "cmc@1")},
        "chosen": current.figures(),
        "decisions": decisions,
        "table": table,
    }
    return replace(current.chain, chosen_on=chosen_on, calibration=calibrate(evidence, current.chain))


def row(trial: Trial) -> dict[str, Any]:
    """One line of the table of choices."""
    return {"chain": trial.chain.describe(), **trial.figures()}


def spelled(difference: statistics.Difference) -> dict[str, Any]:
    """A difference as chain.json spells it."""
    return {
        "mean": difference.mean,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
    }


def log_choice(chosen: Trial, decisions: Sequence[dict[str, Any]]) -> None:
    """One line for each step tried and one for the outcome."""
    for decision in decisions:
        gain = decision["gain"]["map@10"]
        logger.info(
            "%s: mAP@10 %+.4f [%+.4f, %+.4f] on set-aside labels: %s",
            decision["step"], gain["mean"], *gain["ci95"], "taken" if decision["taken"] else "not taken",
        )  # fmt: skip
    if not chosen.chain.steps:
        logger.info("no step improves the set-aside labels beyond noise: the chain is the first stage alone")
    else:
        logger.info("chosen chain: %s", chosen.chain.describe())


def calibrate(evidence: Evidence, chain: Chain) -> dict[str, Any]:
    """A logistic curve from the chain's pairwise (or first-stage) distance to the probability of a match, and
    its ECE."""
    lists = (
        evidence.lists
        if chain.pairwise is None
        else apply_pairwise(chain.pairwise, evidence.lists, logits_of(evidence))
    )
    top_n = lists.items.shape[1] if chain.pairwise is None else chain.pairwise.top_n
    items, distances = lists.items[:, :top_n], lists.distances[:, :top_n]
    is_there = (items >= 0) & distances.isfinite()
    is_match = metrics.relevance(items, evidence.labels, evidence.labels)[is_there]
    if not is_match.any() or is_match.all():
        return {}
    curve = calibration.fit_logistic(distances[is_there], is_match)
    probabilities = calibration.probability(distances[is_there], curve)
    return {
        "of": "pairwise" if chain.pairwise is not None else "first_stage",
        "slope": curve.slope,
        "intercept": curve.intercept,
        "ece": calibration.expected_calibration_error(probabilities, is_match),
    }


def logits_of(evidence: Evidence) -> Tensor:
    """The logits, which must be there."""
    assert evidence.logits is not None, "a pairwise step needs logits"
    return evidence.logits
