"""The settings of each step that are tried, and how every query fares with each. Layer 3.

A step that needs the probability of a match has a curve fitted to labels. Such a setting is measured twice: with the
curve of either half of the labels, on the queries of that half. So constants can be chosen on one half and measured
on the other with nothing in them that has seen it. Settings that share their costly part (a neighbourhood's overlap,
expanded embeddings) and differ in the weight of the probability only are computed together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from jaxtyping import Bool
from torch import Tensor

from distributed_rerank.chain.apply import neighbour_distances, probabilities_of
from distributed_rerank.chain.chain import (
    Chain,
    NeighbourhoodStep,
    PairwiseStep,
    ProbabilityStep,
    QueryExpansionStep,
)
from distributed_rerank.chain.evidence import Evidence, Trial, fit_curve, try_chain
from distributed_rerank.tensors.calibration import Logistic
from distributed_rerank.tensors.match_neighbourhood import mix, reorder_stably
from distributed_rerank.tensors.metrics import PerQuery

FUSION_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the first-stage distance beside the logit; the larger, the more the first stage counts."""
KINDS = ("direct", "reciprocal")
SIZES = tuple(product((10, 20, 30), (1, 3, 6)))
"""(k1, k2) of the neighbourhoods tried."""
ORIGINAL_WEIGHTS = (0.3, 0.5, 0.7)
"""Of the probability beside the overlap, or beside the expanded distance."""
EXPANSIONS = tuple(product((5, 10, 20), (1.0, 2.0)))
"""(k, alpha) of the query expansions tried."""


@dataclass(frozen=True)
class Settings:
    """Chains that differ in the constants of their last step, and the values of every query with each."""

    chains: Sequence[Chain]
    values: Sequence[PerQuery]
    """Each query with what was fitted on its own half of the labels."""
    measure: Callable[[int, bool], PerQuery]
    """Values of every query with setting number i and what was fitted on the first half of the labels (True) or the
    second."""


def fusion_settings(evidence: Evidence) -> Settings:
    """Every way of fusing the logits with the first stage's distances; no constant is fitted to labels."""
    trials = fusion_trials(evidence)
    return Settings(
        [trial.chain for trial in trials],
        [trial.values for trial in trials],
        lambda number, is_first: trials[number].values,
    )


def fusion_trials(evidence: Evidence) -> list[Trial]:
    """The logits alone, then with ever more of the first stage's distance."""
    assert evidence.logits is not None, "fusing needs logits"
    top_n = evidence.logits.shape[1]
    steps = [PairwiseStep(top_n, "fuse", weight, logit_scale(evidence)) for weight in FUSION_WEIGHTS]
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


def neighbour_settings(evidence: Evidence, before: Trial, is_first_half: Bool[Tensor, " query"]) -> Settings | None:
    """Neighbourhood and query expansion steps on top of a chain, with all constants that the lists are long enough
    for; None where no curve can be fitted."""
    curves = {is_first: fit_curve(evidence, before, is_first_half == is_first) for is_first in (True, False)}
    whole = fit_curve(evidence, before)
    first, second = curves[True], curves[False]
    if first is None or second is None or whole is None:
        return None
    groups = step_groups(before.lists.items.shape[1], has_embeddings=evidence.embeddings is not None)
    steps = [step for group in groups for step in group]
    values = [{key: torch.zeros(len(is_first_half), dtype=torch.float64) for key in before.values} for _ in steps]
    for curve, rows in ((first, is_first_half), (second, ~is_first_half)):
        found = [part for group in groups for part in group_values(evidence, before, group, curve, rows)]
        for target, part in zip(values, found, strict=True):
            for key in target:
                target[key][rows] = part[key]

    def measure(number: int, is_first: bool) -> PerQuery:
        everyone = torch.ones_like(is_first_half)
        return group_values(evidence, before, [steps[number]], first if is_first else second, everyone)[0]

    chains = [Chain((*before.chain.steps, with_curve(step, whole))) for step in steps]
    return Settings(chains, values, measure)


def step_groups(longest: int, *, has_embeddings: bool) -> list[Sequence[ProbabilityStep]]:
    """Steps without a curve yet; those of a group differ in their weight only."""
    groups: list[Sequence[ProbabilityStep]] = [
        [NeighbourhoodStep(0.0, 0.0, kind, k1, k2, weight) for weight in ORIGINAL_WEIGHTS]
        for kind in KINDS
        for k1, k2 in SIZES
        if k1 <= longest
    ]
    if has_embeddings:
        groups += [
            [QueryExpansionStep(0.0, 0.0, k, alpha, weight) for weight in ORIGINAL_WEIGHTS]
            for k, alpha in EXPANSIONS
            if k <= longest
        ]
    return groups


def with_curve(step: ProbabilityStep, curve: Logistic) -> ProbabilityStep:
    """The step with this curve."""
    return replace(step, slope=curve.slope, intercept=curve.intercept)


def group_values(
    evidence: Evidence,
    before: Trial,
    group: Sequence[ProbabilityStep],
    curve: Logistic,
    rows: Bool[Tensor, " every_query"],
) -> list[PerQuery]:
    """Values of these queries with each step of the group."""
    queries = evidence.queries[rows]
    lists = before.lists
    probabilities = probabilities_of(with_curve(group[0], curve), lists)
    distances = neighbour_distances(group[0], lists, probabilities, evidence.embeddings, queries)
    return [
        evidence.measure(
            queries,
            reorder_stably(lists.items[queries], mix(distances, probabilities[queries], original_weight=step.weight))[
                0
            ],
        )
        for step in group
    ]
