"""Which labels are probably wrong, and which images only look alike: an estimated precision for every suspect.

An image whose neighbours agree on one other label, and hardly on its own, is a suspect. Products that look alike give
such images too, so what a score means is found out on the images themselves: if a label were wrong, the neighbours of
the own label would be those that agree on another one. The scores that this would give, and those that there are, say
how many of the images down to a place of the list are wrong, if `PRIOR` of all labels are.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

PRIOR = 0.01
"""Share of labels that are assumed to be wrong, before any image is looked at."""
PROBABLE = 0.5
"""From this precision on a label is called wrong, and not a look-alike's."""


def evidence_of_labels(
    weights: Float[Tensor, "image k"], candidate_labels: Int64[Tensor, "image k"], own_labels: Int64[Tensor, " image"]
) -> tuple[Float64[Tensor, " image"], Float64[Tensor, " image"], Int64[Tensor, " image"]]:
    """Summed weight of the neighbours with the own label, that of the strongest other label, and this label.

    Labels below 0 are unknown and count for nothing; without any other known label the last column is -1. Of equally
    strong labels the one with the nearest neighbour is taken.
    """
    if not weights.shape[1]:
        nothing = torch.zeros(len(own_labels), dtype=torch.float64)
        return nothing, nothing, torch.full_like(own_labels, -1)
    is_known = candidate_labels >= 0
    weights = torch.where(is_known, weights.double(), 0.0)
    is_own = (candidate_labels == own_labels[:, None]) & is_known
    # [image, k]: all weight of the label of each neighbour; one pass over the neighbours keeps memory small.
    totals = torch.zeros_like(weights)
    for column in range(weights.shape[1]):
        is_same = candidate_labels == candidate_labels[:, column : column + 1]
        totals[:, column] = torch.where(is_same, weights, 0.0).sum(dim=1)
    others = torch.where(is_own | ~is_known, -1.0, totals)
    strongest, place = others.max(dim=1)
    label = torch.where(strongest >= 0, candidate_labels.gather(1, place[:, None])[:, 0], -1)
    return torch.where(is_own, weights, 0.0).sum(dim=1), strongest.clamp(min=0), label


def precision_of_suspects(
    own: Float64[Tensor, " image"], other: Float64[Tensor, " image"], prior: float = PRIOR
) -> Float64[Tensor, " image"]:
    """Estimated share of wrong labels among the images that are at least as suspect as each one.

    `own` and `other` are those of `evidence_of_labels`. `prior` of all labels are taken to be wrong, or fewer where not
    so many images are suspect enough. The most suspect image has the largest value or shares it.
    """
    score = (other + 0.5) / (own + other + 1)
    # A wrong label is as often that of a look-alike as one that no neighbour has.
    if_wrong = torch.cat([(own + 0.5) / (own + rest + 1) for rest in (other, 0.0)])
    n = len(score)
    # [image]: how many images have such a score or a higher one, as they are and if every label were wrong.
    seen, planted = _as_high(score, score), _as_high(if_wrong, score) / 2
    # Wherever most wrong labels would show, there cannot be more of them than there are images.
    limits = (seen / planted)[planted >= n / 2]
    share = min(prior, float(limits.min())) if len(limits) else prior
    precision = (share * planted / seen).clamp(max=1)
    # Down the list the precision can only fall; noise in small counts must not turn two images round.
    order = score.argsort(descending=True, stable=True)
    falling = precision[order].cummin(dim=0).values
    return torch.empty_like(precision).index_copy_(0, order, falling)


def most_uncertain(
    certainty: Float[Tensor, " query"], group: Int64[Tensor, " query"], n: int
) -> Int64[Tensor, " chosen"]:
    """At most `n` queries, the least certain first, of as many groups as possible; ties by position.

    The least certain query of each group comes before the second of any.
    """
    order = certainty.argsort(stable=True)
    by_group = order[group[order].argsort(stable=True)]
    # [query]: how many of its own group are less certain.
    _, counts = group.unique(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(by_group)
    place[by_group] = torch.arange(len(by_group)) - starts
    return order[place[order].argsort(stable=True)][:n]


def _as_high(values: Float64[Tensor, " value"], edges: Float64[Tensor, " image"]) -> Float64[Tensor, " image"]:
    """How many values are at least each edge."""
    ascending = values.sort().values
    return (len(values) - torch.searchsorted(ascending, edges.contiguous())).double()
