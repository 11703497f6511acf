"""k-reciprocal re-ranking (Zhong et al., CVPR 2017) on sparse top-k lists.

Two items are near where their neighbourhoods overlap, so it needs no training. The paper works on an n x n matrix. Here
every part reads the lists of the nearest neighbours of all n items and answers for a block of items, in O(items x k)
memory, so that blocks can be spread over workers and put together again without changing a bit.

The lists are `items` [n, k] (item numbers 0..n-1, -1 = fewer than k exist) and `distances` [n, k] (inf there), each row
ascending and not negative. All n items, queries and gallery alike, need a list over all n items: an item in nobody's
list has no reciprocal neighbour. A list does not contain its own item. The paper's does, at rank 0 with distance 0, so
it is added here.
"""

import math

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.ragged import SparseRows, concatenate, offsets_of, row_sums

# Rows at a time: bounds scratch memory (rows x k1^3 / 4 numbers) and keeps the overlap table in the cache.
BLOCK_ROWS = 128


def distance_scale(distances: Float32[Tensor, "item k"]) -> float:
    """A unit for the distances: the median over the items of the last finite distance of their list.

    The paper's code divides squared distances by the largest of a row of the whole matrix, which lists do not hold. A
    median is exact in any order, and one outlier does not move it. Compute it once, on all lists, and pass the number
    to every block. Returns 1 where no list ends at a positive distance.
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

    R(i, k) holds i and those of its k nearest that have i among their own k nearest. R(i, k1) is widened by R(c, k1/2)
    (k1/2 rounded half to even) of each c in it of which more than two thirds lie in R(i, k1). The weight of member m is
    proportional to exp(-d(i, m) / scale), with d(i, i) = 0. A member outside i's list gets the distance of the list's
    last entry, the least it can be: the answer is that of the dense definition with each row of the distance matrix cut
    off at the end of its list. Raises `BadInput` for k1 < 1, lists shorter than k1, negative distances or a scale that
    is not positive.
    """
    check_k1(items, k1)
    if not 0 < scale < math.inf:
        raise BadInput(f"scale={scale} must be positive and finite; use distance_scale of the lists")
    if bool((distances[block] < 0).any()):
        raise BadInput("negative distances; subtract the smallest distance of all lists from all of them")
    return concatenate([_encode_rows(items, distances, rows, k1, scale) for rows in block.split(BLOCK_ROWS)])


def expand_encoding(
    encoding: SparseRows, items: Int64[Tensor, "item k"], block: Int64[Tensor, " row"], *, k2: int
) -> SparseRows:
    """Local query expansion: the mean encoding of each item of `block` and its k2 - 1 nearest.

    `encoding` holds all n items. k2 = 1 changes nothing. Where fewer than k2 - 1 neighbours exist the mean is over
    those.
    """
    if k2 < 1 or k2 > items.shape[1] + 1:
        raise BadInput(f"k2={k2} must lie in 1..{items.shape[1] + 1}; retrieve more or lower k2")
    return concatenate([_expand_rows(encoding, items, rows, k2) for rows in block.split(BLOCK_ROWS)])


def jaccard_distances(
    encoding: SparseRows, query_items: Int64[Tensor, " query"], candidate_items: Int64[Tensor, "query k"]
) -> Float32[Tensor, "query k"]:
    """Jaccard distance 1 - sum min / sum max of the encodings of each query and its candidates; inf where -1.

    `encoding` holds all n items. The candidates need not be the lists behind the encoding (they may leave out items
    that are not in the gallery). Only the given pairs are computed.
    """
    local = torch.full((len(encoding.offsets) - 1,), -1, dtype=torch.int64)
    blocks = zip(query_items.split(BLOCK_ROWS), candidate_items.split(BLOCK_ROWS), strict=True)
    return torch.cat([_jaccard_rows(encoding, queries, candidates, local) for queries, candidates in blocks])


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
    # Sort by item first; the stable sort by distance then leaves equal distances in the order of their items.
    by_item = items.argsort(dim=1)
    keys = torch.where(items >= 0, distances, torch.inf)
    keys, items = keys.gather(1, by_item), items.gather(1, by_item)
    order = keys.argsort(dim=1, stable=True)
    # A present candidate may be at inf too, and -1 sorts first: a last stable sort moves the missing ones to the end.
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

    Nothing enters or leaves a list, and the input is not changed. Unlike in the paper distances are not squared. They
    are divided by `scale`, by default the `distance_scale` of the lists.
    """
    scale = distance_scale(distances) if scale is None else scale
    everything = torch.arange(len(items))
    encoding = encode_k_reciprocal(items, distances, everything, k1=k1, scale=scale)
    if k2 > 1:
        encoding = expand_encoding(encoding, items, everything, k2=k2)
    jaccard = jaccard_distances(encoding, everything, items)
    return reorder(items, blend(jaccard, distances, original_weight=original_weight, scale=scale))


def check_k1(items: Int64[Tensor, "item k"], k1: int) -> None:
    """Raise `BadInput` unless 1 <= k1 <= k."""
    if k1 < 1 or k1 > items.shape[1]:
        raise BadInput(f"k1={k1} must lie in 1..{items.shape[1]}, the length of the lists; retrieve more or lower k1")


def _nearest_with_self(
    items: Int64[Tensor, "item k"], rows: Int64[Tensor, "..."], k: int
) -> Int64[Tensor, "... width"]:
    """Each row's item and its k nearest; all -1 where the row is -1."""
    near = torch.cat([rows[..., None], items[rows.clamp(min=0), :k]], dim=-1)
    return torch.where(rows[..., None] >= 0, near, -1)


def _reciprocal_members(
    items: Int64[Tensor, "item k"], rows: Int64[Tensor, "..."], k: int
) -> Int64[Tensor, "... width"]:
    """R(row, k), filled up with -1: the row's item and those of its k nearest that have it among their own."""
    near = _nearest_with_self(items, rows, k)
    # [..., neighbour, k] holds the lists of the k nearest; is the row's item in each?
    is_mutual = (items[near[..., 1:].clamp(min=0), :k] == rows[..., None, None]).any(dim=-1)
    return torch.cat([near[..., :1], torch.where(is_mutual, near[..., 1:], -1)], dim=-1)


def distinct_members(
    items: Int64[Tensor, "item k"], rows: Int64[Tensor, " row"], k1: int
) -> tuple[Int64[Tensor, " entry"], Int64[Tensor, " entry"]]:
    """R(row, k1), widened as in `encode_k_reciprocal`, as distinct pairs (position in `rows`, member), ascending."""
    # [row, 1 + k1]: the row's item and its reciprocal neighbours.
    core = _reciprocal_members(items, rows, k1)
    # [row, 1 + k1, 1 + k1/2]: the smaller reciprocal neighbourhood of each of these.
    around = _reciprocal_members(items, core, round(k1 / 2))
    # Which of those are in the row's core too; one core member at a time, to hold no fourth dimension.
    is_shared = torch.zeros(around.shape, dtype=torch.bool)
    for member in core.unbind(dim=1):
        is_shared |= around == member[:, None, None]
    # [row, 1 + k1]: whether more than two thirds of a neighbourhood are; its members then join the row's.
    is_there = around >= 0
    is_close = 3 * (is_shared & is_there).sum(dim=-1) > 2 * is_there.sum(dim=-1)
    members = torch.cat([core, torch.where(is_close[..., None], around, -1).flatten(1)], dim=1)
    # One number for each (row, member), so that repetitions fall together.
    keys = torch.unique((torch.arange(len(rows))[:, None] * len(items) + members)[members >= 0])
    return keys // len(items), keys % len(items)


def _encode_rows(
    items: Int64[Tensor, "item k"],
    distances: Float32[Tensor, "item k"],
    rows: Int64[Tensor, " row"],
    k1: int,
    scale: float,
) -> SparseRows:
    """`encode_k_reciprocal` of one small block."""
    # [entry]: one entry for each member of each row's neighbourhood, ascending by (row, member).
    row, member = distinct_members(items, rows, k1)
    # The distance of an entry is looked up in the row's list [row, k]. All lists become one sorted list of keys row * n
    # + item [row * k], with -1 where no item is; `order` says where in the lists a key comes from.
    n_items, lists, known = len(items), items[rows], distances[rows].double()
    list_keys, order = torch.where(lists >= 0, torch.arange(len(rows))[:, None] * n_items + lists, -1).flatten().sort()
    keys = row * n_items + member
    at = torch.searchsorted(list_keys, keys).clamp(max=len(list_keys) - 1)
    # [entry]: the listed distance; that of the list's last item if the member is not listed; 0 for the row's own item.
    last = torch.where(lists >= 0, known, 0.0).amax(dim=1)
    distance = torch.where(list_keys[at] == keys, known.flatten()[order[at]], last[row])
    distance = torch.where(member == rows[row], 0.0, distance)
    # Weights that sum to 1 in each row.
    lengths = torch.bincount(row, minlength=len(rows))
    weights = (-distance / scale).exp()
    return SparseRows(offsets_of(lengths), member, weights / row_sums(weights, lengths)[row])


def _expand_rows(
    encoding: SparseRows, items: Int64[Tensor, "item k"], rows: Int64[Tensor, " row"], k2: int
) -> SparseRows:
    """`expand_encoding` of one small block."""
    # [row, k2]: the encodings to average for each row; then the same without missing ones, row after row.
    n_items = len(items)
    near = _nearest_with_self(items, rows, k2 - 1)
    row = torch.arange(len(rows))[:, None].expand_as(near)[near >= 0]
    # [entry]: all entries of these encodings, keyed by (row, column) and sorted so that equal keys are neighbours.
    lengths, entries = encoding.entries_of(near[near >= 0])
    keys = row.repeat_interleave(lengths) * n_items + encoding.columns[entries]
    keys, order = keys.sort(stable=True)
    unique_keys, counts = torch.unique_consecutive(keys, return_counts=True)
    # Weights of equal keys are added up, nearest encoding first, and divided by the number of encodings.
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
    """`jaccard_distances` of one small block. `local` is scratch space [n], filled with -1 before and after."""
    # The columns that any query of the block uses get consecutive numbers; `local` maps a column to its number.
    lengths, entries = encoding.entries_of(queries)
    used = torch.unique(encoding.columns[entries])
    local[used] = torch.arange(len(used))
    # [query, used + 1]: the queries' encodings as a dense table. Its last column stays 0.
    table = torch.zeros(len(queries), len(used) + 1, dtype=torch.float64)
    query_of = torch.arange(len(queries)).repeat_interleave(lengths)
    table[query_of, local[encoding.columns[entries]]] = encoding.weights[entries]
    # [entry]: all entries of the encodings of all candidates, pair after pair, and for each the table's cell in its
    # query's row and its column. A column that no query uses has number -1, which is the last one modulo the width.
    is_there = candidates >= 0
    lengths, entries = encoding.entries_of(candidates[is_there])
    pair_row = torch.arange(len(queries))[:, None].expand_as(candidates)[is_there].repeat_interleave(lengths)
    cells = pair_row * table.shape[1] + local[encoding.columns[entries]] % table.shape[1]
    # [pair]: the sum of the smaller weights. Both encodings sum to 1, so the larger ones sum to 2 - overlap.
    overlap = row_sums(torch.minimum(table.flatten()[cells], encoding.weights[entries]), lengths)
    local[used] = -1
    answer = torch.full(candidates.shape, torch.inf)
    answer[is_there] = (1 - overlap / (2 - overlap)).float()
    return answer
