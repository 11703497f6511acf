"""Exact nearest neighbours by L2 distance: bounded memory, ties by item, same bits for any tiling.

Layer 1. Three steps per slice of the gallery and block of queries. (1) One matrix product gives approximate
squared distances, in bfloat16 where a CPU multiplies it natively and in float32 elsewhere. (2) The n-th
smallest minimum of groups of columns is at least the n-th smallest entry of a row; every entry within twice
the error bound of it (module `distances`) may be among the true n nearest and is kept, however many they
are; where bfloat16 would keep too many, float32 chooses. (3) The kept pairs get their exact distance. So the
product only chooses; distances and order come from the pairs alone, which is why neither tile and block sizes
nor the format of the product can change the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.distances import (
    Rounded,
    exact_pair_distances,
    relative_squared_error,
    relative_squared_tile,
    rounded_error,
    rounded_gallery,
    rounded_queries,
    squared_norms,
)
from distributed_rerank.tensors.hardware import bf16_support
from distributed_rerank.tensors.sharding import blocks

LARGEST_SQUARED_NORM = 2.0**120
QUERY_BLOCK = 256
GALLERY_SLICE = 65_536
LARGEST_GROUP = 32
SMALLEST_ROUNDED = 2**24
"""Multiplications of a product below which rounding its factors costs more than it saves."""
BF16_ROUNDING = 2.0**-8 * (1 + 2.0**-10)
"""Largest part of itself that a number loses or gains when it is rounded to 8 bits."""
MOST_KEPT = 4
"""Groups per neighbour that a bfloat16 product may keep before float32 chooses instead."""

Tile = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Neighbours:
    """The nearest gallery items of each query, a row ascending by (distance, item).

    `items` are item numbers; -1, with distance inf, fills a row that has fewer.
    """

    items: Int64[Tensor, "query neighbour"]
    distances: Float[Tensor, "query neighbour"]

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> "Neighbours":
        """The rows of these queries."""
        return Neighbours(self.items[rows], self.distances[rows])


@runtime_checkable
class Ranking(Protocol):
    """What gives the `Neighbours` of the queries asked for: held as they are, or made when asked for."""

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> Neighbours:
        """The rows of these queries."""
        ...


@dataclass(frozen=True)
class _Side:
    """Embeddings with what the search needs to know about them."""

    embeddings: Float[Tensor, "item dim"]
    items: Int64[Tensor, " item"]
    sequences: Int64[Tensor, " item"] | None
    norms: Float[Tensor, " item"]
    rounded: Rounded | None = None

    def part(self, start: int, stop: int) -> "_Side":
        rows = slice(start, stop)
        sequences = None if self.sequences is None else self.sequences[rows]
        rounded = None if self.rounded is None else Rounded(self.rounded.factors[rows], self.rounded.residuals[rows])
        return _Side(self.embeddings[rows], self.items[rows], sequences, self.norms[rows], rounded)


def nearest(
    query_embeddings: Float[Tensor, "query dim"],
    gallery_embeddings: Float[Tensor, "gallery dim"],
    *,
    query_items: Int64[Tensor, " query"],
    gallery_items: Int64[Tensor, " gallery"],
    query_sequences: Int64[Tensor, " query"] | None = None,
    gallery_sequences: Int64[Tensor, " gallery"] | None = None,
    n_items: int,
    query_block: int = QUERY_BLOCK,
    gallery_slice: int = GALLERY_SLICE,
) -> Neighbours:
    """The `n_items` nearest gallery items of each query by L2 distance (not squared), ties by item number.

    Never the query's own item (by number, not by position), nor an item of its own sequence (-1 = no
    sequence). A row with fewer than `n_items` possible items is filled with -1 and inf, so `n_items` may
    exceed the gallery. Gallery items are distinct; their order does not matter. Memory beside the inputs: a
    few times `query_block` x `gallery_slice` x 4 bytes. Neither size changes a bit of the answer.

    Raises BadInput for `n_items` below 1 and for an embedding that is not finite or too large to be squared.
    """
    tile = (gallery_embeddings, gallery_items, gallery_sequences)
    return search_tiles(
        query_embeddings,
        [tile],
        query_items=query_items,
        query_sequences=query_sequences,
        n_items=n_items,
        query_block=query_block,
        gallery_slice=gallery_slice,
    )


def search_tiles(
    query_embeddings: Float[Tensor, "query dim"],
    tiles: Iterable[Tile],
    *,
    query_items: Int64[Tensor, " query"],
    query_sequences: Int64[Tensor, " query"] | None = None,
    n_items: int,
    query_block: int = QUERY_BLOCK,
    gallery_slice: int = GALLERY_SLICE,
) -> Neighbours:
    """`nearest` in a gallery that comes as tiles (embeddings, items, sequences or None), one at a time.

    The distances found so far limit what is looked at in the next tile, so later tiles cost little more than
    their matrix product. The order and the size of the tiles do not change a bit of the answer.
    """
    if n_items < 1:
        raise BadInput(f"n_items={n_items} retrieves nothing; ask for at least 1")
    queries = _side(query_embeddings, query_items, query_sequences)
    is_rounded = bf16_support(query_embeddings.device) is not None and query_embeddings.device.type == "cpu"
    queries = replace(queries, rounded=rounded_queries(query_embeddings)) if is_rounded else queries
    query_blocks = blocks(len(query_items), query_block)
    found = [_nobody(stop - start, n_items, query_embeddings) for start, stop in query_blocks]
    workspace = torch.empty(0, device=query_embeddings.device)
    for embeddings, items, sequences in tiles:
        assert (sequences is None) == (query_sequences is None), "sequences are given for both sides or for none"
        gallery = _sorted_by_item(_side(embeddings, items, sequences))
        # One buffer for every product: fresh pages for each would cost as much as half of the product itself.
        size = min(query_block, len(query_items)) * (min(gallery_slice, len(items)) + LARGEST_GROUP)
        workspace = workspace if workspace.numel() >= size else workspace.new_empty(size)
        for left, right in blocks(len(items), gallery_slice):
            part = gallery.part(left, right)
            if is_rounded and len(query_items) * part.embeddings.numel() >= SMALLEST_ROUNDED:
                part = replace(part, rounded=_rounded(part, n_items))
            for number, (start, stop) in enumerate(query_blocks):
                near = _nearest_in_slice(queries.part(start, stop), part, found[number], n_items, workspace)
                found[number] = merge(found[number], near, n_items)
    found.append(_nobody(0, n_items, query_embeddings))
    return Neighbours(torch.cat([f.items for f in found]), torch.cat([f.distances for f in found]))


def merge(a: Neighbours, b: Neighbours, n_items: int) -> Neighbours:
    """The first `n_items` of both, row by row, by (distance, item).

    Associative and commutative, so partial results may arrive in any order. No item may be in both.
    """
    items = torch.cat([a.items, b.items], dim=1)
    distances = torch.cat([a.distances, b.distances], dim=1)
    missing = n_items - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
    by_item = items.argsort(dim=1)
    distances, by_distance = distances.gather(1, by_item).sort(dim=1, stable=True)
    order = by_item.gather(1, by_distance[:, :n_items])
    return Neighbours(items.gather(1, order), distances[:, :n_items].contiguous())


def _side(embeddings: Tensor, items: Tensor, sequences: Tensor | None) -> _Side:
    """Check the embeddings and add their norms (float64)."""
    squared = squared_norms(embeddings)
    # NaN compares false, so this catches it together with inf and with rows whose squares would overflow
    # float32.
    bad = (~(squared < LARGEST_SQUARED_NORM)).nonzero()
    if len(bad) > 0:
        item = int(items[bad[0, 0]])
        raise BadInput(
            f"the embedding of item {item} is not finite or longer than 2^60 ({len(bad)} such); "
            "embed it again or remove it from the catalogue"
        )
    sequences = None if sequences is None else sequences.contiguous()
    return _Side(embeddings, items.contiguous(), sequences, squared.sqrt())


def _sorted_by_item(gallery: _Side) -> _Side:
    """The same gallery in ascending item order, copied only if it is not; items must be distinct."""
    if bool((gallery.items.diff() <= 0).any()):
        order = gallery.items.argsort()
        sequences = None if gallery.sequences is None else gallery.sequences[order]
        gallery = _Side(gallery.embeddings[order], gallery.items[order], sequences, gallery.norms[order])
        assert not bool((gallery.items.diff() == 0).any()), "an item occurs twice in one gallery tile"
    return gallery


def _nobody(n_queries: int, n_items: int, like: Tensor) -> Neighbours:
    items = torch.full((n_queries, n_items), -1, dtype=torch.int64, device=like.device)
    return Neighbours(items, torch.full(items.shape, torch.inf, device=like.device))


def _rounded(gallery: _Side, n_items: int) -> Rounded:
    """A slice of the gallery as a right factor with whole groups of rows."""
    group = _group_size(len(gallery.items), n_items)
    n_rows = -(-len(gallery.items) // group) * group
    return rounded_gallery(gallery.embeddings, gallery.norms.square().float(), n_rows)


def _nearest_in_slice(queries: _Side, gallery: _Side, found: Neighbours, n_items: int, workspace: Tensor) -> Neighbours:
    """The nearest of one slice, except items that are surely further than the n-th one found so far."""
    pairs = None if gallery.rounded is None else _pairs_by_rounded(queries, gallery, found, n_items, workspace)
    rows, columns = _pairs_by_float32(queries, gallery, found, n_items, workspace) if pairs is None else pairs
    distances = exact_pair_distances(queries.embeddings, gallery.embeddings, rows, columns)
    return _first_of_each_row(rows, gallery.items[columns], distances, len(queries.items), n_items)


def _pairs_by_float32(
    queries: _Side, gallery: _Side, found: Neighbours, n_items: int, workspace: Tensor
) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
    """Rows and columns of all pairs that may be among the nearest, by a float32 product."""
    n_queries, n_gallery = len(queries.items), len(gallery.items)
    group = _group_size(n_gallery, n_items)
    n_groups = -(-n_gallery // group)
    padded = workspace[: n_queries * n_groups * group].view(n_queries, n_groups * group)
    padded[:, n_gallery:] = torch.inf
    relative_squared_tile(queries.embeddings, gallery.embeddings, gallery.norms.square().float(), padded[:, :n_gallery])
    padded[_excluded_pairs(queries, gallery)] = torch.inf
    error = relative_squared_error(queries.norms.square(), float(gallery.norms.max()), queries.embeddings.shape[1])
    minima = padded.view(n_queries, n_groups, group).amin(dim=2)
    bound = _bound(minima, found, n_items, queries, error)
    rows, groups = _groups_up_to(minima, bound)
    return _entries_up_to(padded, group, rows, groups, bound)


def _pairs_by_rounded(
    queries: _Side, gallery: _Side, found: Neighbours, n_items: int, workspace: Tensor
) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]] | None:
    """The same by a bfloat16 product; None where it tells too few apart, such as near-duplicates."""
    assert queries.rounded is not None, "both sides are rounded"
    assert gallery.rounded is not None, "both sides are rounded"
    n_queries, n_columns = len(queries.items), len(gallery.rounded.factors)
    # Half of the space of the float32 product.
    padded = workspace.view(torch.bfloat16)[: n_queries * n_columns].view(n_queries, n_columns)
    torch.mm(queries.rounded.factors, gallery.rounded.factors.t(), out=padded)
    padded[_excluded_pairs(queries, gallery)] = torch.inf
    error = rounded_error(
        queries.norms.square(), float(gallery.norms.max()), queries.embeddings.shape[1],
        queries.rounded.residuals, float(gallery.rounded.residuals.max()),
    )  # fmt: skip
    group = _group_size(len(gallery.items), n_items)
    minima = _minima_as_float32(padded, group)
    bound = _bound(minima, found, n_items, queries, error, BF16_ROUNDING)
    rows, groups = _groups_up_to(minima, bound)
    if len(rows) > MOST_KEPT * n_items * n_queries:
        return None
    return _entries_up_to(padded, group, rows, groups, bound)


def _minima_as_float32(padded: Tensor, group: int) -> Float32[Tensor, "query group"]:
    """Minima of groups of columns, through float32 a few rows at a time: torch has no fast minimum of bfloat16."""
    out = torch.empty(len(padded), padded.shape[1] // group, device=padded.device)
    for start, stop in blocks(len(padded), 8):
        torch.amin(padded[start:stop].float().view(stop - start, -1, group), dim=2, out=out[start:stop])
    return out


def _bound(
    minima: Float32[Tensor, "query group"],
    found: Neighbours,
    n_items: int,
    queries: _Side,
    error: Float64[Tensor, " query"],
    rounding: float = 0.0,
) -> Float64[Tensor, " query"]:
    """What the entry of a true neighbour cannot exceed.

    `error` is that of an entry before it was rounded by up to `rounding` of itself. Rounding keeps the order, so
    entries are compared with the bound rounded up.
    """
    # An item at float32 distance <= limit has a true squared distance of at most limit^2 (1 + 2^-24)^2.
    beyond = found.distances[:, -1].double().square() * (1 + 2.0**-22) - queries.norms.square() * (1 - 2.0**-40) + error
    if not bool(beyond.isfinite().all()) and minima.shape[1] >= n_items:
        smallest = minima.topk(n_items, dim=1, largest=False, sorted=False).values.amax(dim=1).double()
        beyond = torch.minimum(beyond, _rounded_up(smallest, rounding) + 2 * error)
    return _rounded_up(beyond, rounding)


def _rounded_up(values: Float64[Tensor, " query"], rounding: float) -> Float64[Tensor, " query"]:
    """`values`, finite ones, increased by the part `rounding` of themselves."""
    values = values.clamp(max=torch.finfo(torch.float32).max)
    return values + values.abs() * rounding


def _group_size(n_gallery: int, n_items: int) -> int:
    """Columns per group: as many as leave clearly more groups than neighbours, at most two cache lines."""
    group = LARGEST_GROUP
    while group > 1 and n_gallery < 4 * n_items * group:
        group //= 2
    return group


def _groups_up_to(minima: Tensor, bound: Tensor) -> tuple[Int64[Tensor, " group"], Int64[Tensor, " group"]]:
    """Rows and numbers of the groups that have an entry up to the bound of their row, ascending."""
    rows, groups = (minima <= _as_float32(bound)[:, None]).nonzero(as_tuple=True)
    return rows, groups


def _entries_up_to(
    padded: Tensor, group: int, rows: Tensor, groups: Tensor, bound: Tensor
) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
    """Rows and columns, ascending, of all finite entries of these groups that do not exceed the bound of their row."""
    n_groups = padded.shape[1] // group
    values = padded.view(-1, group).index_select(0, rows * n_groups + groups).float()
    entry, offset = (values <= _as_float32(bound)[rows][:, None]).nonzero(as_tuple=True)
    return rows[entry], groups[entry] * group + offset


def _as_float32(bound: Float64[Tensor, " query"]) -> Float32[Tensor, " query"]:
    """Rounded up, and finite: a bound that is too high only costs a few exact distances."""
    rounded = bound.clamp(max=torch.finfo(torch.float32).max).float()
    rounded = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return rounded.clamp_(max=torch.finfo(torch.float32).max)


def _first_of_each_row(rows: Tensor, items: Tensor, distances: Tensor, n_queries: int, n_items: int) -> Neighbours:
    """The `n_items` first by (distance, item) of each row; `rows` ascend, and within a row `items` ascend."""
    counts = torch.bincount(rows, minlength=n_queries)
    width = max(int(counts.max()), 1)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    table = _nobody(n_queries, width, rows)
    table.items[rows, place] = items
    table.distances[rows, place] = distances
    # Columns stand in item order, so a stable sort leaves equal distances ordered by item.
    ordered, order = table.distances.sort(dim=1, stable=True)
    return Neighbours(table.items.gather(1, order[:, :n_items]), ordered[:, :n_items])


def _excluded_pairs(queries: _Side, gallery: _Side) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
    """Rows and columns of the pairs of an item with itself and of items of one sequence (a pair may come
    twice).
    """
    columns = torch.searchsorted(gallery.items, queries.items).clamp_(max=len(gallery.items) - 1)
    rows = (gallery.items[columns] == queries.items).nonzero()[:, 0]
    columns = columns[rows]
    if queries.sequences is None or gallery.sequences is None:
        return rows, columns
    by_sequence, order = gallery.sequences.sort(stable=True)
    first = torch.searchsorted(by_sequence, queries.sequences)
    n_same = torch.searchsorted(by_sequence, queries.sequences, right=True) - first
    n_same[_is_without(queries.sequences)] = 0
    same_rows = torch.arange(len(n_same), device=rows.device).repeat_interleave(n_same)
    within = torch.arange(len(same_rows), device=rows.device) - (n_same.cumsum(0) - n_same)[same_rows]
    same_columns = order[first[same_rows] + within]
    return torch.cat([rows, same_rows]), torch.cat([columns, same_columns])


def _is_without(sequences: Int64[Tensor, " item"]) -> Bool[Tensor, " item"]:
    return sequences < 0
