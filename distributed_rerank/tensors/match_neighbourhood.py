"""Re-ranking by neighbourhoods in which each neighbour counts by its probability of being a match.

It reads the same lists of all n items as `neighbourhood`, in the same O(items x k) memory, but weighs a neighbour by
its probability (`calibration`) instead of a scaled distance: a pairwise model's probabilities fall off where the
matches end, a distance does not. There are two kinds of neighbourhood: "reciprocal" is that of Zhong et al. (CVPR
2017); "direct" is the first k1 of the list, which needs no reciprocity and suits labels with few images.

The lists are `items` [n, k] (item numbers 0..n-1, -1 = fewer than k exist), best first, without the item itself, and
`probabilities` [n, k] (0 where there is no candidate).
"""

from typing import Literal

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.neighbourhood import (
    BLOCK_ROWS,
    check_k1,
    distinct_members,
    expand_encoding,
    jaccard_distances,
)
from distributed_rerank.tensors.ragged import SparseRows, concatenate, offsets_of, row_sums

Kind = Literal["reciprocal", "direct"]


def encode_matches(
    items: Int64[Tensor, "item k"],
    probabilities: Float64[Tensor, "item k"],
    block: Int64[Tensor, " row"],
    *,
    kind: Kind,
    k1: int,
) -> SparseRows:
    """The neighbourhoods of the items in `block`, one row of n weights each, summing to 1.

    reciprocal: the members are those of k-reciprocal encoding; member j of i weighs the larger of the probabilities
    that the lists of i and of j give to the pair, 0 if neither lists it. direct: the members are the first k1 of the
    list, with its probabilities. The item itself weighs 1. Raises `BadInput` for k1 < 1 or lists shorter than k1.
    """
    check_k1(items, k1)
    encode = _reciprocal_rows if kind == "reciprocal" else _direct_rows
    return concatenate([encode(items, probabilities, rows, k1) for rows in block.split(BLOCK_ROWS)])


def overlap_distances(
    items: Int64[Tensor, "item k"],
    probabilities: Float64[Tensor, "item k"],
    queries: Int64[Tensor, " query"],
    *,
    kind: Kind,
    k1: int,
    k2: int,
) -> Float32[Tensor, "query k"]:
    """Jaccard distance of the neighbourhoods of these items and of the items in their lists; inf where -1.

    Each neighbourhood is the mean of the item's own and those of its k2 - 1 nearest (local query expansion).
    """
    everything = torch.arange(len(items))
    encoding = encode_matches(items, probabilities, everything, kind=kind, k1=k1)
    if k2 > 1:
        encoding = expand_encoding(encoding, items, everything, k2=k2)
    return jaccard_distances(encoding, queries, items[queries])


def mix(
    distances: Float32[Tensor, "query k"], probabilities: Float64[Tensor, "query k"], *, original_weight: float
) -> Float32[Tensor, "query k"]:
    """(1 - w) * distance + w * (1 - probability), w = `original_weight`; inf stays inf."""
    if not 0 <= original_weight <= 1:
        raise BadInput(f"original_weight={original_weight} must lie in [0, 1]")
    mixed = (1 - original_weight) * distances.double() + original_weight * (1 - probabilities)
    return torch.where(distances.isfinite(), mixed, torch.inf).float()


def reorder_stably(
    items: Int64[Tensor, "query k"], distances: Float32[Tensor, "query k"], pinned: int = 0
) -> tuple[Int64[Tensor, "query k"], Float32[Tensor, "query k"]]:
    """Rows sorted by distance; ties keep their order, so that pairs of probability 0 stay as they were.

    The first `pinned` candidates keep their places: they get the smallest distance of their row.
    """
    if pinned and distances.shape[1]:
        smallest = distances.amin(dim=1, keepdim=True).expand(-1, min(pinned, distances.shape[1]))
        distances = torch.cat([smallest, distances[:, pinned:]], dim=1)
    distances, order = distances.sort(dim=1, stable=True)
    return items.gather(1, order), distances


def _direct_rows(
    items: Int64[Tensor, "item k"], probabilities: Float64[Tensor, "item k"], rows: Int64[Tensor, " row"], k1: int
) -> SparseRows:
    # [row, 1 + k1]: the item itself with weight 1, then its k1 nearest with their probabilities.
    near = torch.cat([rows[:, None], items[rows, :k1]], dim=1)
    weights = torch.cat([torch.ones(len(rows), 1).double(), probabilities[rows, :k1]], dim=1)
    # Sparse rows have ascending columns; missing items (-1) come first and are dropped.
    by_item = near.argsort(dim=1)
    near, weights = near.gather(1, by_item), weights.gather(1, by_item)
    is_there = near >= 0
    return _normalised(is_there.sum(dim=1), near[is_there], weights[is_there])


def _reciprocal_rows(
    items: Int64[Tensor, "item k"], probabilities: Float64[Tensor, "item k"], rows: Int64[Tensor, " row"], k1: int
) -> SparseRows:
    # [entry]: each row's item (`owner`) with each member of its neighbourhood, ascending by (row, member).
    row, member = distinct_members(items, rows, k1)
    owner = rows[row]
    weights = torch.maximum(
        _listed_probability(items, probabilities, owner, member),
        _listed_probability(items, probabilities, member, owner),
    )
    weights = torch.where(member == owner, 1.0, weights)
    return _normalised(torch.bincount(row, minlength=len(rows)), member, weights)


def _listed_probability(
    items: Int64[Tensor, "item k"],
    probabilities: Float64[Tensor, "item k"],
    owners: Int64[Tensor, " pair"],
    others: Int64[Tensor, " pair"],
) -> Float64[Tensor, " pair"]:
    """The probability that each owner's list gives to the other item; 0 if the other is not in it."""
    # [pair, k]: the owners' lists, of which at most one place holds the other item.
    return torch.where(items[owners] == others[:, None], probabilities[owners], 0.0).sum(dim=1)


def _normalised(
    lengths: Int64[Tensor, " row"], columns: Int64[Tensor, " entry"], weights: Float64[Tensor, " entry"]
) -> SparseRows:
    return SparseRows(offsets_of(lengths), columns, weights / row_sums(weights, lengths).repeat_interleave(lengths))
