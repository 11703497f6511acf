"""k-reciprocal re-ranking (Zhong et al., CVPR 2017) on sparse top-k lists. Layer 1: pure functions.

It needs no training: two items are near where their neighbourhoods overlap. The paper works on an n x n
matrix; here every step reads the lists of the nearest neighbours of all n items and answers for a block of
items, in O(items x k) memory, so that blocks can be spread over workers and put together again without
changing a bit.

The lists are `items` [n, k] (item numbers 0..n-1, -1 = fewer than k exist) and `distances` [n, k] (inf
there), each row ascending and not negative. All n items, queries and gallery alike, need a list over all n
items: an item that is in nobody's list has no reciprocal neighbour. A list does not contain its own item; the
paper's does, at rank 0 with distance 0, and so it is put there here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput

# Rows at a time: bounds scratch memory (rows x k1^3 / 4 numbers) and keeps the overlap table in the cache.
BLOCK_ROWS = 128


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix. Row r holds `columns[offsets[r]:offsets[r + 1]]`, ascending, and their `weights`."""

    offsets: Int64[Tensor, " row_ends"]
    columns: Int64[Tensor, " entry"]
    weights: Float64[Tensor, " entry"]


def concatenate(blocks: Sequence[SparseRows]) -> SparseRows:
    """The rows of all blocks, in the order given."""
    lengths = torch.cat([block.offsets.diff() for block in blocks])
    columns = torch.cat([block.columns for block in blocks])
    return SparseRows(offsets_of(lengths), columns, torch.cat([block.weights for block in blocks]))


def distance_scale(distances: Float32[Tensor, "item k"]) -> float:
    """A unit for the distances: the median over the items of the last finite distance of their list.

    The paper's code divides squared distances by the largest of a row of the whole matrix, which lists do not
    hold. A median of given numbers is exact in any order and one outlier does not move it. Compute it once,
    on the whole lists, and hand the number to every block. Returns 1 where no list has a positive end.
    """
    if not distances.numel():
        return 1.0
    ends = torch.where(distances.isfinite(), distances, 0).amax(dim=1)
    ends = ends[ends > 0]
    return float(ends.median()) if len(ends) else 1.0


def encode_k_reciprocal(
    items: Int64[Tensor, "item k"],
    distances: Float32[Tensor, "item k"],
    block: Int64[Tensor, " row"],
    *,
    k1: int,
    scale: float,
) -> SparseRows:
    """The k-reciprocal encoding of the items in `block`, one row of n weights each, summing to 1.

    R(i, k) holds i and those of its k nearest that have i among their own k nearest. R(i, k1) is widened by
    R(c, k1/2) (k1/2 rounded half to even) of each c in it of which more than two thirds lie in R(i, k1). The
    weight of member m is proportional to exp(-d(i, m) / scale), d(i, i) = 0. A member outside i's list gets
    the distance of its last entry, the least it can be: the answer is that of the dense definition with each
    row of the distance matrix cut off at the end of its list. Raises `BadInput` for k1 < 1, lists shorter
    than k1, negative distances or a scale that is not positive.
    """
    if k1 < 1 or k1 > items.shape[1]:
        raise BadInput(f"k1={k1} must lie in 1..{items.shape[1]}, the length of the lists; retrieve more or lower k1")
    if not 0 < scale < math.inf:
        raise BadInput(f"scale={scale} must be positive and finite; use distance_scale of the lists")
    if bool((distances[block] < 0).any()):
        raise BadInput("negative distances; subtract the smallest distance of all lists from all of them")
    parts = [_encode_rows(items, distances, rows, k1, scale) for rows in block.split(BLOCK_ROWS)]
    return concatenate(parts) if parts else _empty_rows()


def expand_encoding(
    encoding: SparseRows, items: Int64[Tensor, "item k"], block: Int64[Tensor, " row"], *, k2: int
) -> SparseRows:
    """Local query expansion: the mean encoding of each item of `block` and its k2 - 1 nearest.

    `encoding` holds all n items. k2 = 1 changes nothing. Where fewer than k2 - 1 neighbours exist the
    mean is over those.
    """
    if k2 < 1 or k2 > items.shape[1] + 1:
        raise BadInput(f"k2={k2} must lie in 1..{items.shape[1] + 1}; retrieve more or lower k2")
    parts = [_expand_rows(encoding, items, rows, k2) for rows in block.split(BLOCK_ROWS)]
    return concatenate(parts) if parts else _empty_rows()


def jaccard_distances(
    encoding: SparseRows, query_items: Int64[Tensor, " query"], candidate_items: Int64[Tensor, "query k"]
) -> Float32[Tensor, "query k"]:
    """Jaccard distance 1 - sum min / sum max of the encodings of each query and its candidates; inf where -1.

    `encoding` holds all n items. The candidates need not be the lists that the encoding was made from (they
    may leave out items that are not in the gallery); pairs that are not asked for are not computed.
    """
    local = torch.full((len(encoding.offsets) - 1,), -1, dtype=torch.int64)
    parts = [
        _jaccard_rows(encoding, queries, candidates, local)
        for queries, candidates in zip(query_items.split(BLOCK_ROWS), candidate_items.split(BLOCK_ROWS), strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(candidate_items.shape)


def blend(
    jaccard: Float32[Tensor, "query k"],
    distances: Float32[Tensor, "query k"],
    *,
    original_weight: float,
    scale: float,
) -> Float32[Tensor, "query k"]:
    """The final distance (1 - lambda) * Jaccard + lambda * distance / scale; lambda = `original_weight`."""
    if not 0 <= original_weight <= 1:
        raise BadInput(f"original_weight={original_weight} must lie in [0, 1]")
    blended = (1 - original_weight) * jaccard.double() + original_weight * distances.double() / scale
    return torch.where(distances.isfinite(), blended, torch.inf).float()


def reorder(
    items: Int64[Tensor, "query k"], distances: Float32[Tensor, "query k"]
) -> tuple[Int64[Tensor, "query k"], Float32[Tensor, "query k"]]:
    """Rows sorted by (distance, item), missing candidates (-1) last with distance inf."""
    by_item = items.argsort(dim=1)
    keys = torch.where(items >= 0, distances, torch.inf)
    keys, items = keys.gather(1, by_item), items.gather(1, by_item)
    # A present candidate may be at inf too, and -1 sorts first: the second key keeps the missing ones last.
    order = keys.argsort(dim=1, stable=True)
    order = order.gather(1, (items < 0).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    return items.gather(1, order), keys.gather(1, order)


def k_reciprocal(
    items: Int64[Tensor, "item k"],
    distances: Float32[Tensor, "item k"],
    *,
    k1: int = 20,
    k2: int = 6,
    original_weight: float = 0.3,
    scale: float | None = None,
) -> tuple[Int64[Tensor, "item k"], Float32[Tensor, "item k"]]:
    """k-reciprocal re-ranking of all lists in one process: the lists re-ordered, with their new distances.

    The steps above, one after the other; nothing enters or leaves a list. Distances are taken as they are
    given (the paper squares them) and divided by `scale`, by default `distance_scale` of the lists. The input
    is left as it is.
    """
    scale = distance_scale(distances) if scale is None else scale
    everything = torch.arange(len(items))
    encoding = encode_k_reciprocal(items, distances, everything, k1=k1, scale=scale)
    if k2 > 1:
        encoding = expand_encoding(encoding, items, everything, k2=k2)
    jaccard = jaccard_distances(encoding, everything, items)
    return reorder(items, blend(jaccard, distances, original_weight=original_weight, scale=scale))


def _nearest_with_self(
    items: Int64[Tensor, "item k"], rows: Int64[Tensor, "..."], k: int
) -> Int64[Tensor, "... width"]:
    """Each row's item and its k nearest; all -1 where the row is -1."""
    near = torch.cat([rows[..., None], items[rows.clamp(min=0), :k]], dim=-1)
    return torch.where(rows[..., None] >= 0, near, -1)


def _reciprocal_members(
    items: Int64[Tensor, "item k"], rows: Int64[Tensor, "..."], k: int
) -> Int64[Tensor, "... width"]:
    """R(row, k), padded by -1: the row's item and those of its k nearest that have it among their own."""
    near = _nearest_with_self(items, rows, k)
    is_mutual = (items[near[..., 1:].clamp(min=0), :k] == rows[..., None, None]).any(dim=-1)
    return torch.cat([near[..., :1], torch.where(is_mutual, near[..., 1:], -1)], dim=-1)


def expanded_members(
    items: Int64[Tensor, "item k"], rows: Int64[Tensor, " row"], k1: int
) -> Int64[Tensor, "row width"]:
    """R*(row, k1), padded by -1, with repetitions: the row's item, its reciprocal neighbours and their close ones.

    Which those are: see `encode_k_reciprocal`.
    """
    core = _reciprocal_members(items, rows, k1)
    around = _reciprocal_members(items, core, round(k1 / 2))
    is_shared = torch.zeros(around.shape, dtype=torch.bool)
    for member in core.unbind(dim=1):
        is_shared |= around == member[:, None, None]
    is_there = around >= 0
    is_close = 3 * (is_shared & is_there).sum(dim=-1) > 2 * is_there.sum(dim=-1)
    return torch.cat([core, torch.where(is_close[..., None], around, -1).flatten(1)], dim=1)


def _encode_rows(
    items: Int64[Tensor, "item k"],
    distances: Float32[Tensor, "item k"],
    rows: Int64[Tensor, " row"],
    k1: int,
    scale: float,
) -> SparseRows:
    n_items = len(items)
    members = expanded_members(items, rows, k1)
    local_row = torch.arange(len(rows))[:, None]
    keys = torch.unique((local_row * n_items + members)[members >= 0])
    row, column = keys // n_items, keys % n_items
    lists, known = items[rows], distances[rows].double()
    last = torch.where(lists >= 0, known, 0.0).amax(dim=1)
    list_keys, order = torch.where(lists >= 0, local_row * n_items + lists, -1).flatten().sort()
    at = torch.searchsorted(list_keys, keys).clamp(max=len(list_keys) - 1)
    distance = torch.where(list_keys[at] == keys, known.flatten()[order[at]], last[row])
    distance = torch.where(column == rows[row], 0.0, distance)
    lengths = torch.bincount(row, minlength=len(rows))
    weights = (-distance / scale).exp()
    return SparseRows(offsets_of(lengths), column, weights / row_sums(weights, lengths)[row])


def _expand_rows(
    encoding: SparseRows, items: Int64[Tensor, "item k"], rows: Int64[Tensor, " row"], k2: int
) -> SparseRows:
    n_items = len(items)
    near = _nearest_with_self(items, rows, k2 - 1)
    row = torch.arange(len(rows))[:, None].expand_as(near)[near >= 0]
    lengths, entries = _entries_of(encoding, near[near >= 0])
    keys = row.repeat_interleave(lengths) * n_items + encoding.columns[entries]
    keys, order = keys.sort(stable=True)
    unique_keys, counts = torch.unique_consecutive(keys, return_counts=True)
    sums = row_sums(encoding.weights[entries][order], counts)
    row, column = unique_keys // n_items, unique_keys % n_items
    n_averaged = (near >= 0).sum(dim=1).double()
    return SparseRows(offsets_of(torch.bincount(row, minlength=len(rows))), column, sums / n_averaged[row])


def _jaccard_rows(
    encoding: SparseRows,
    queries: Int64[Tensor, " query"],
    candidates: Int64[Tensor, "query k"],
    local: Int64[Tensor, " item"],
) -> Float32[Tensor, "query k"]:
    """`local` is a scratch row of n times -1 and is handed back so."""
    lengths, entries = _entries_of(encoding, queries)
    used = torch.unique(encoding.columns[entries])
    local[used] = torch.arange(len(used))
    table = torch.zeros(len(queries), len(used) + 1, dtype=torch.float64)
    query_of = torch.arange(len(queries)).repeat_interleave(lengths)
    table[query_of, local[encoding.columns[entries]]] = encoding.weights[entries]
    # Column -1, the last one, stays 0: it takes the entries that no query of the block has.
    is_there = candidates >= 0
    lengths, entries = _entries_of(encoding, candidates[is_there])
    pair_row = torch.arange(len(queries))[:, None].expand_as(candidates)[is_there].repeat_interleave(lengths)
    cells = pair_row * table.shape[1] + local[encoding.columns[entries]] % table.shape[1]
    overlap = row_sums(torch.minimum(table.flatten()[cells], encoding.weights[entries]), lengths)
    local[used] = -1
    answer = torch.full(candidates.shape, torch.inf)
    answer[is_there] = (1 - overlap / (2 - overlap)).float()
    return answer


def _entries_of(
    encoding: SparseRows, rows: Int64[Tensor, " row"]
) -> tuple[Int64[Tensor, " row"], Int64[Tensor, " entry"]]:
    """Lengths of the given rows and the positions of their entries, row after row."""
    starts = encoding.offsets[rows]
    lengths = encoding.offsets[rows + 1] - starts
    shift = starts - (lengths.cumsum(0) - lengths)
    return lengths, torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)


def row_sums(values: Float64[Tensor, " entry"], lengths: Int64[Tensor, " row"]) -> Float64[Tensor, " row"]:
    """Sum of each run of `lengths` values, from first to last."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def offsets_of(lengths: Int64[Tensor, " row"]) -> Int64[Tensor, " row_ends"]:
    """Where rows of these lengths begin, and the end of the last."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _empty_rows() -> SparseRows:
    return SparseRows(
        offsets_of(torch.zeros(0, dtype=torch.int64)),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0).double(),
    )
