"""What mining found, in figures: the table that is printed before training (layer 1)."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.tensors.candidate_mining import are_negative, are_positive
from distributed_rerank.tensors.knn import Neighbours


@dataclass(frozen=True)
class DistanceSummary:
    """Count and location of some distances; the figures are None when there are none."""

    n: int
    mean: float | None
    median: float | None
    smallest: float | None
    largest: float | None


@dataclass(frozen=True)
class MiningStatistics:
    """Counts of anchors and candidates (no fillers), and first-stage distances in the candidate lists."""

    n_anchors: int
    n_candidates: int
    n_positives: int
    n_negatives: int
    dropped: dict[str, int]
    """How many negatives each filter dropped."""
    positive_distances: DistanceSummary
    negative_distances: DistanceSummary
    """Of the negatives that passed the filters."""
    n_without_positive: int
    """Anchors with no positive in their candidate list."""
    n_without_negative: int
    """Anchors that no allowed negative is left for."""
    share_of_hardest_used: float
    """Share of the anchors with any negative whose nearest one passed the filters; 0 if no anchor has one."""


def mining_statistics(
    neighbours: Neighbours,
    anchor_items: Int64[Tensor, " query"],
    labels: Int64[Tensor, " item"],
    allowed: Bool[Tensor, "query neighbour"],
    dropped: dict[str, int],
) -> MiningStatistics:
    """Figures of what `candidate_mining.filter_negatives` (the origin of the last two arguments) left."""
    positives = are_positive(neighbours, anchor_items, labels)
    negatives = are_negative(neighbours, anchor_items, labels)
    has_negative = negatives.any(dim=1)
    is_hardest = negatives & (negatives.cumsum(dim=1) == 1)
    n_hardest_used = int((is_hardest & allowed).sum())
    return MiningStatistics(
        n_anchors=len(anchor_items),
        n_candidates=int((neighbours.items >= 0).sum()),
        n_positives=int(positives.sum()),
        n_negatives=int(negatives.sum()),
        dropped=dict(dropped),
        positive_distances=_summary(neighbours.distances[positives]),
        negative_distances=_summary(neighbours.distances[allowed]),
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
