"""The chain is chosen on labels set aside from `train`.

Chain steps are tried one after the other: first fusion of the logits with the first-stage distances, then
neighbourhoods and query expansion on the result. A chain step joins the chain only if its gain holds on labels that its
constants were not chosen on: the set-aside labels are halved, the best constants of either half are measured on the
other, and a gain over the chain so far must be probable enough (`judge`). Otherwise the chain stays as it was; with
no chain step at all it is the first stage, and the log says so.

A chain step that needs the probability of a match has a curve fitted to labels. Its settings are measured twice: with
the curve of either half of the labels, on all queries. So constants are chosen on one half and measured on the other
with nothing in them that has seen it. Settings that share their costly part (a neighbourhood's overlap, expanded
embeddings) and differ only in the weight of the probability and in pinned places are computed together.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from distributed_rerank.chain.apply import neighbour_distances, probabilities_of
from distributed_rerank.chain.chain import (
    Chain,
    NeighbourhoodStep,
    PairwiseStep,
    ProbabilityStep,
    QueryExpansionStep,
)
from distributed_rerank.chain.evidence import CMC_WEIGHT, Evidence, Trial, fit_curve, half_of_labels, try_chain
from distributed_rerank.chain.probability import calibrate
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.calibration import Logistic
from distributed_rerank.tensors.match_neighbourhood import mix, reorder_stably
from distributed_rerank.tensors.metrics import PerQuery

logger = logging.getLogger(__name__)

FUSION_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the first-stage distance beside the logit; the larger, the more the first stage counts."""
KINDS = ("direct",)
"""Reciprocal neighbours need the query in the gallery's lists; on grocery they gave mAP@10 .793, direct ones .792."""
SIZES = tuple(product((10, 20, 30), (1, 3, 6)))
"""(k1, k2) of the neighbourhoods tried."""
ORIGINAL_WEIGHTS = (0.3, 0.5, 0.7)
"""Of the probability beside the overlap, or beside the expanded distance."""
WEIGHTS_AND_PINNED = tuple(product(ORIGINAL_WEIGHTS, (0, 1)))
"""With every weight as well: the first candidate stays where it is, so that CMC@1 cannot fall."""
EXPANSIONS = tuple(product((5, 10, 20), (1.0, 2.0)))
"""(k, alpha) of the query expansions tried."""
ACCEPT = 0.995
"""A chain step joins where its gain is so probable; high, for several are tried, and nobody may be harmed."""
PRIOR_SPREAD, PRIOR_LABELS = 0.1, 2
"""What is assumed of the spread of a gain between labels before any is seen: as if two labels had shown 10 points."""
MIN_GAIN = 0.005
"""A smaller gain of the objective is not worth a chain step, even if it is real."""
MOVES_FIRST = 0.95
"""Neighbours may move the first candidate only where CMC@1 gains with this probability. Else it is pinned, so CMC@1 is
that of the pairwise step, on any labels."""
CLEARLY_BETTER = 0.005
"""A larger weight of the first stage must raise mAP@10 + CMC@1 by more than this. The measured models have seen fewer
labels than the model that is kept, and lean on the first stage more than it has to."""


Pick = Callable[[Sequence[PerQuery], Trial, Bool[Tensor, " query"]], int]
"""The number of the best setting by these values on some queries, beside the chain so far."""


@dataclass(frozen=True)
class Settings:
    """Chains that differ in the constants of their last step, and the values of every query with each."""

    chains: Sequence[Chain]
    values: Sequence[PerQuery]
    """Each query with constants fitted to its own half of the labels."""
    measure: Callable[[int, bool], PerQuery]
    """Values of every query with setting number i and the curve of the first (True) or second half of the labels."""


def choose(evidence: Evidence, seed: int = 0, accept: float = ACCEPT) -> Chain:
    """The chain for these labels, with the figures of every setting tried in `chosen_on` and a calibration.

    A step joins where the probability of its gain (`judge`) is at least `accept`. Without logits only the chain steps
    that need no training are tried.
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
        if name == "neighbours" and evidence.target == "both":
            pick = best_that_keeps_first(labels)
        table += [row(chain, values) for chain, values in zip(settings.chains, settings.values, strict=True)]
        # Settings that would lose CMC@1 against the chain so far are not chosen where others are there.
        values = cross_fitted_values(settings, current, is_first_half, pick)
        counts_map = evidence.target == "both"
        decision = judge(name, current.values, values, first_stage, labels, seed, accept, counts_map=counts_map)
        decisions.append(decision)
        if decisions[-1]["taken"]:
            everyone = torch.ones_like(is_first_half)
            current = try_chain(evidence, settings.chains[pick(settings.values, current, everyone)])
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
    """The settings tried as the next chain step; None where nothing can be tried."""
    if bool(is_first_half.all()) or not bool(is_first_half.any()):
        return None
    if name == "neighbours":
        return neighbour_settings(evidence, current, is_first_half)
    if evidence.logits is None:
        return None
    # No constant of a fusion is fitted to labels, so both halves measure the same.
    trials = fusion_trials(evidence)
    values = [trial.values for trial in trials]
    return Settings([trial.chain for trial in trials], values, lambda number, is_first: values[number])


def fusion_figure(evidence: Evidence) -> dict[str, float]:
    """Figures of the best fusion, for early stopping: the model's worth if training ended now."""
    return max((trial.figures() for trial in fusion_trials(evidence)), key=lambda figures: figures["map@10"])


def fusion_trials(evidence: Evidence) -> list[Trial]:
    """The logits alone, then with ever more of the first stage's distance."""
    assert evidence.logits is not None, "fusing needs logits"
    top_n = evidence.logits.shape[1]
    fusions = [PairwiseStep(top_n, "fuse", weight, logit_scale(evidence)) for weight in FUSION_WEIGHTS]
    return [try_chain(evidence, Chain((fusion,))) for fusion in fusions]


def logit_scale(evidence: Evidence) -> float:
    """The temperature that gives logits the spread of the distances, so that one grid of weights suits every model."""
    assert evidence.logits is not None, "a scale needs logits"
    head = evidence.lists.distances[:, : evidence.logits.shape[1]]
    is_there = evidence.logits.isfinite() & head.isfinite()
    if int(is_there.sum()) < 2:
        return 1.0
    spread = float(evidence.logits[is_there].double().std()) / max(1e-12, float(head[is_there].double().std()))
    return spread if spread > 1e-6 else 1.0


def neighbour_settings(evidence: Evidence, before: Trial, is_first_half: Bool[Tensor, " query"]) -> Settings | None:
    """Neighbourhood and query expansion steps on top of a chain, with all constants that fit the lists' length.

    None where no curve can be fitted.
    """
    first, second = (fit_curve(evidence, before, is_first_half == is_first) for is_first in (True, False))
    whole = fit_curve(evidence, before)
    if first is None or second is None or whole is None:
        return None
    groups = step_groups(before.lists.items.shape[1], has_embeddings=evidence.embeddings is not None)
    steps = [step for group in groups for step in group]
    # For each chain step and metric: [query], filled half by half with the values under that half's own curve.
    values = [{key: torch.zeros(len(is_first_half), dtype=torch.float64) for key in before.values} for _ in steps]
    for curve, rows in ((first, is_first_half), (second, ~is_first_half)):
        of_half = [part for group in groups for part in group_values(evidence, before, group, curve, rows)]
        for target, part in zip(values, of_half, strict=True):
            for key in target:
                target[key][rows] = part[key]

    def measure(number: int, is_first: bool) -> PerQuery:
        everyone = torch.ones_like(is_first_half)
        return group_values(evidence, before, [steps[number]], first if is_first else second, everyone)[0]

    chains = [Chain((*before.chain.steps, with_curve(step, whole))) for step in steps]
    return Settings(chains, values, measure)


def step_groups(longest: int, *, has_embeddings: bool) -> list[Sequence[ProbabilityStep]]:
    """Chain steps without a curve yet; those of a group differ in weight and pinned places only."""
    groups: list[Sequence[ProbabilityStep]] = [
        [NeighbourhoodStep(0.0, 0.0, kind, k1, k2, weight, pinned) for weight, pinned in WEIGHTS_AND_PINNED]
        for kind in KINDS
        for k1, k2 in SIZES
        if k1 <= longest
    ]
    if has_embeddings:
        groups += [
            [QueryExpansionStep(0.0, 0.0, k, alpha, weight, pinned) for weight, pinned in WEIGHTS_AND_PINNED]
            for k, alpha in EXPANSIONS
            if k <= longest
        ]
    return groups


def with_curve(step: ProbabilityStep, curve: Logistic) -> ProbabilityStep:
    """The chain step with this curve."""
    return replace(step, slope=curve.slope, intercept=curve.intercept)


def group_values(
    evidence: Evidence,
    before: Trial,
    group: Sequence[ProbabilityStep],
    curve: Logistic,
    rows: Bool[Tensor, " every_query"],
) -> list[PerQuery]:
    """Values of these queries with each chain step of the group."""
    queries = evidence.queries[rows]
    lists = before.lists
    # The group's costly part, once: [item, k] probabilities and [query, k] distances.
    probabilities = probabilities_of(with_curve(group[0], curve), lists)
    distances = neighbour_distances(group[0], lists, probabilities, evidence.embeddings, queries)
    values = []
    for step in group:
        mixed = mix(distances, probabilities[queries], original_weight=step.weight)
        items, _ = reorder_stably(lists.items[queries], mixed, step.pinned)
        values.append(evidence.measure(queries, items))
    return values


def without_cmc_loss(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> list[int]:
    """Numbers of the settings with no lower CMC@1 than the first stage on these queries; all, where none has."""
    floor = float(first_stage.values["cmc@1"][rows].mean())
    numbers = [number for number, value in enumerate(values) if float(value["cmc@1"][rows].mean()) >= floor]
    return numbers or list(range(len(values)))


def best(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> int:
    """Number of the setting with the largest objective on these queries, among those without a loss of CMC@1."""
    return max(
        without_cmc_loss(values, first_stage, rows), key=lambda number: float(values[number]["objective"][rows].mean())
    )


def best_that_keeps_first(labels: Int64[Tensor, " query"]) -> Pick:
    """As `best`, among the settings that leave every first candidate or surely gain CMC@1 (`MOVES_FIRST`)."""

    def pick(values: Sequence[PerQuery], before: Trial, rows: Bool[Tensor, " query"]) -> int:
        gains = [(value["cmc@1"] - before.values["cmc@1"])[rows] for value in values]
        allowed = [
            number
            for number, gain in enumerate(gains)
            if not bool(gain.any()) or probability_of_gain(gain, labels[rows]) >= MOVES_FIRST
        ] or list(range(len(values)))
        return allowed[best([values[number] for number in allowed], before, rows)]

    return pick


def probability_of_gain(gain: Float64[Tensor, " query"], labels: Int64[Tensor, " query"]) -> float:
    """That the mean gain is above 0, with the module's prior for few labels."""
    return statistics.probability_of_gain(gain, labels, prior_spread=PRIOR_SPREAD, prior_clusters=PRIOR_LABELS)


def smallest_best_weight(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> int:
    """Number of the setting with the largest mAP@10 + CMC@1, among those without a loss of CMC@1.

    A later setting, with a larger weight of the first stage, must be clearly better.
    """
    chosen, chosen_figure = -1, -1.0
    for number in without_cmc_loss(values, first_stage, rows):
        figure = float((values[number]["map@10"][rows] + values[number]["cmc@1"][rows]).mean())
        if chosen < 0 or figure > chosen_figure + CLEARLY_BETTER:
            chosen, chosen_figure = number, figure
    return chosen


def cross_fitted_values(
    settings: Settings, first_stage: Trial, is_first_half: Bool[Tensor, " query"], pick: Pick
) -> PerQuery:
    """Values of each query with all constants from the half of the labels without its own."""
    values = {key: column.clone() for key, column in first_stage.values.items()}
    for is_first in (True, False):
        chosen_on = is_first_half == is_first
        measured = settings.measure(pick(settings.values, first_stage, chosen_on), is_first)
        for key in values:
            values[key][~chosen_on] = measured[key][~chosen_on]
    return values


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
) -> dict[str, Any]:
    """The decision about a chain step, for chain.json: its gain, how probable one is, and whether it is taken.

    Taken where the objective rises with probability `accept` and by enough to matter; neither may mAP@10 have fallen,
    nor CMC@1 be below the first stage's. Where mAP@10 counts, its own gain is enough if CMC@1 has not fallen: CMC@1
    varies so much between labels that it would hide a gain of mAP@10.
    """
    gain = statistics.compare({key: before[key] for key in after}, after, labels, seed=seed)
    sure_by = ["objective", *(["map@10"] if counts_map and gain["cmc@1"].mean >= 0 else [])]
    probability = max(probability_of_gain(after[key] - before[key], labels) for key in sure_by)
    is_harmless = gain["map@10"].mean >= 0 and float((after["cmc@1"] - first_stage.values["cmc@1"]).mean()) >= 0
    return {
        "step": name,
        "taken": probability >= accept and gain["objective"].mean >= MIN_GAIN and is_harmless,
        "probability": probability,
        "accept": accept,
        "gain": {key: gain_to_json(difference) for key, difference in gain.items()},
        "n_labels": len(labels.unique()),
    }


def row(chain: Chain, values: PerQuery) -> dict[str, Any]:
    """One line of the table of choices."""
    return {"chain": chain.describe(), **{key: float(values[key].mean()) for key in ("map@10", "cmc@1")}}


def gain_to_json(difference: statistics.Difference) -> dict[str, Any]:
    """A difference as chain.json holds it."""
    return {
        "mean": difference.mean,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
    }


def outcome(decision: dict[str, Any]) -> str:
    """Whether the chain step was taken, how sure its gain is, and what would change a decision against it."""
    probability, accept, mean = decision["probability"], decision["accept"], decision["gain"]["objective"]["mean"]
    if decision["taken"]:
        return f"taken, for it gains with a probability of {probability:.1%} (--accept {accept:g})"
    if mean < MIN_GAIN:
        return f"not taken, for mAP@10 + {CMC_WEIGHT:g} CMC@1 does not rise by {MIN_GAIN:g}"
    if probability >= accept:
        return "not taken, for mAP@10 or CMC@1 would fall"
    return (
        f"not taken, for it gains with a probability of {probability:.1%} only, where --accept asks for {accept:g}; "
        f"with the same gain about {labels_needed(decision)} labels would do instead of {decision['n_labels']}"
    )


def labels_needed(decision: dict[str, Any]) -> int:
    """The number of labels with which a gain of this size and spread between labels would be sure enough."""
    wanted = NormalDist().inv_cdf(min(decision["accept"], 0.9999))
    found = NormalDist().inv_cdf(min(max(decision["probability"], 0.51), 0.9999))
    return math.ceil(decision["n_labels"] * (wanted / found) ** 2)


def log_choice(chosen: Trial, decisions: Sequence[dict[str, Any]]) -> None:
    """One line for each chain step tried and one for the outcome."""
    log_decisions(decisions)
    if not chosen.chain.steps:
        logger.info("no step improves the set-aside labels surely enough: the chain is the first stage alone")
    else:
        logger.info("chosen chain: %s", chosen.chain.describe())


def log_decisions(decisions: Sequence[dict[str, Any]]) -> None:
    """One line for each chain step tried."""
    for decision in decisions:
        gain = decision["gain"]
        logger.info(
            "%s: mAP@10 %+.4f [%+.4f, %+.4f], CMC@1 %+.4f [%+.4f, %+.4f] on set-aside labels: %s",
            decision["step"], gain["map@10"]["mean"], *gain["map@10"]["ci95"], gain["cmc@1"]["mean"],
            *gain["cmc@1"]["ci95"], outcome(decision),
        )  # fmt: skip
