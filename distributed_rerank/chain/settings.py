"""The settings tried as the next step of a chain, and what each of them does to every query.

A chain step that needs the probability of a match has a curve fitted to labels. Its settings are measured twice: with
the curve of either half of the labels, on all queries. So constants are chosen on one half and measured on the other
with nothing in them that has seen it. Settings that share their costly part (a neighbourhood's overlap, expanded
embeddings) and differ only in the weight of the probability and in pinned places are computed together.
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
from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.chain.trials import Trial, fit_curve, try_chain
from distributed_rerank.tensors.calibration import Logistic
from distributed_rerank.tensors.match_neighbourhood import mix, reorder_stably
from distributed_rerank.tensors.metrics import PerQuery

FUSION_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the first-stage distance beside the logit; the larger, the more the first stage counts."""
PAIRWISE, PINNED_PAIRWISE = "pairwise", "pairwise behind the first candidate"
FUSIONS = {PAIRWISE: 0, PINNED_PAIRWISE: 1}
"""Names of the trials with logits, and how many first candidates stay where they are."""
NEIGHBOURS, PINNED_NEIGHBOURS = "neighbours", "neighbours behind the first candidate"
KINDS = ("direct",)
"""Reciprocal neighbours need the query in the gallery's lists; on grocery they gave mAP@10 .793, direct ones .792."""
SIZES = tuple(product((10, 20, 30), (1, 3, 6)))
"""(k1, k2) of the neighbourhoods tried."""
ORIGINAL_WEIGHTS = (0.3, 0.5, 0.7)
"""Of the probability beside the overlap, or beside the expanded distance."""
WEIGHTS_AND_PINNED = tuple(product(ORIGINAL_WEIGHTS, (1, 0)))
"""With every weight as well: the first candidate stays where it is, so that CMC@1 cannot fall. Tried first: of settings
with equal figures the first is taken, and where no first place has changed they are equal."""
EXPANSIONS = tuple(product((5, 10, 20), (1.0, 2.0)))
"""(k, alpha) of the query expansions tried."""


@dataclass(frozen=True)
class Settings:
    """Chains that differ in the constants of their last step, and the values of every query with each."""

    chains: Sequence[Chain]
    values: Sequence[PerQuery]
    """Each query with constants fitted to its own half of the labels."""
    measure: Callable[[int, bool], PerQuery]
    """Values of every query with setting number i and the curve of the first (True) or second half of the labels."""

    def pinned_numbers(self) -> list[int]:
        """The numbers of those that leave the first candidate where it is."""
        last = [chain.steps[-1] for chain in self.chains]
        return [i for i, step in enumerate(last) if isinstance(step, ProbabilityStep) and step.pinned]

    def pinned(self) -> "Settings":
        """Those that leave the first candidate where it is."""
        kept = self.pinned_numbers()
        return Settings(
            [self.chains[i] for i in kept],
            [self.values[i] for i in kept],
            lambda number, is_first: self.measure(kept[number], is_first),
        )


def settings_for(
    name: str, evidence: Evidence, current: Trial, is_first_half: Bool[Tensor, " query"]
) -> Settings | None:
    """The settings tried as the next chain step; None where nothing can be tried."""
    if bool(is_first_half.all()) or not bool(is_first_half.any()):
        return None
    if name == NEIGHBOURS:
        return neighbour_settings(evidence, current, is_first_half)
    if evidence.logits is None:
        return None
    assert name in FUSIONS, f"no step {name}"
    # No constant of a fusion is fitted to labels, so both halves measure the same.
    trials = fusion_trials(evidence, pinned=FUSIONS[name])
    values = [trial.values for trial in trials]
    return Settings([trial.chain for trial in trials], values, lambda number, is_first: values[number])


def fusion_figure(evidence: Evidence) -> dict[str, float]:
    """Figures of the best fusion, for early stopping: the model's worth if training ended now."""
    return max((trial.figures() for trial in fusion_trials(evidence)), key=lambda figures: figures["map@10"])


def fusion_trials(evidence: Evidence, pinned: int = 0) -> list[Trial]:
    """The logits alone, then with ever more of the first stage's distance; the first `pinned` candidates stay."""
    assert evidence.logits is not None, "fusing needs logits"
    top_n = evidence.logits.shape[1]
    scale = logit_scale(evidence)
    fusions = [PairwiseStep(top_n, "fuse", weight, scale, pinned) for weight in FUSION_WEIGHTS]
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
