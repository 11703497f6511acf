"""Figures about the candidate lists that are mined: the table printed before training."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.candidate_mining import are_negative, are_positive


@dataclass(frozen=True)
class DistanceSummary:
    """Count, mean, median and range of some distances; None where there are none."""

    n: int
    mean: float | None
    median: float | None
    smallest: float | None
    largest: float | None


@dataclass(frozen=True)
class MiningStatistics:
    """Counts of anchors and candidates (missing ones left out), and first-stage distances in the candidate lists."""

    n_anchors: int
    n_candidates: int
    n_positives: int
    n_negatives: int
    dropped: dict[str, int]
    """Number of negatives that each filter dropped."""
    positive_distances: DistanceSummary
    negative_distances: DistanceSummary
    """Of the negatives that passed the filters."""
    n_without_positive: int
    """Anchors with no positive in their candidate list."""
    n_without_negative: int
    """Anchors without any allowed negative."""
    share_of_hardest_used: float
    """Share of anchors whose nearest negative passed the filters, among anchors with a negative; 0 if none has one."""


def mining_statistics(
    lists: CandidateLists,
    labels: Int64[Tensor, " item"],
    allowed: Bool[Tensor, "query k"],
    dropped: dict[str, int],
) -> MiningStatistics:
    """Figures after filtering; `allowed` and `dropped` come from `candidate_mining.filter_negatives`."""
    positives = are_positive(lists, labels)
    negatives = are_negative(lists, labels)
    has_negative = negatives.any(dim=1)
    # Lists ascend by distance, so the first negative of a row is its hardest.
    is_hardest = negatives & (negatives.cumsum(dim=1) == 1)
    n_hardest_used = int((is_hardest & allowed).sum())
    return MiningStatistics(
        n_anchors=len(lists),
        n_candidates=int((lists.items >= 0).sum()),
        n_positives=int(positives.sum()),
        n_negatives=int(negatives.sum()),
        dropped=dict(dropped),
        positive_distances=_summary(lists.distances[positives]),
        negative_distances=_summary(lists.distances[allowed]),
        n_without_positive=int((~positives.any(dim=1)).sum()),
        n_without_negative=int((~allowed.any(dim=1)).sum()),
        share_of_hardest_used=n_hardest_used / max(int(has_negative.sum()), 1),
    )


def _summary(distances: Float[Tensor, " pair"]) -> DistanceSummary:
    if len(distances) == 0:
        return DistanceSummary(0, None, None, None, None)
    ordered = distances.double().sort().values
    middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean()
    return DistanceSummary(
        n=len(ordered),
        mean=float(ordered.mean()),
        median=float(middle),
        smallest=float(ordered[0]),
        largest=float(ordered[-1]),
    )
