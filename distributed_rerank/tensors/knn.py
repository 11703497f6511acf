"""Exact nearest neighbours by L2 distance: bounded memory, ties by item, same bits for any tiling.

Layer 1. Three steps per block of queries and slice of the gallery. (1) One float32 matrix product gives
approximate squared distances. (2) The n-th smallest of a row is found through minima of groups of columns;
every entry within twice the rounding bound of it (`distances.relative_squared_error`) may be among the true n
nearest and is kept, however many they are. (3) The kept pairs get their exact distance. So the product only
chooses; distances and order come from the pairs alone, which is why tile and block sizes cannot change the
result.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.distances import (
    exact_pair_distances,
    relative_squared_error,
    relative_squared_tile,
    squared_norms,
)
from distributed_rerank.tensors.sharding import blocks

LARGEST_SQUARED_NORM = 2.0**120
QUERY_BLOCK = 256
GALLERY_SLICE = 65_536
LARGEST_GROUP = 32

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

    def part(self, start: int, stop: int) -> "_Side":
        sequences = None if self.sequences is None else self.sequences[start:stop]
        return _Side(self.embeddings[start:stop], self.items[start:stop], sequences, self.norms[start:stop])


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
    query_blocks = blocks(len(query_items), query_block)
    found = [_nobody(stop - start, n_items, query_embeddings) for start, stop in query_blocks]
    workspace = torch.empty(0, device=query_embeddings.device)
    for embeddings, items, sequences in tiles:
        assert (sequences is None) == (query_sequences is None), "sequences are given for both sides or for none"
        gallery = _sorted_by_item(_side(embeddings, items, sequences))
        # One buffer for every product: fresh pages for each would cost as much as half of the product itself.
        size = min(query_block, len(query_items)) * (min(gallery_slice, len(items)) + LARGEST_GROUP)
        workspace = workspace if workspace.numel() >= size else workspace.new_empty(size)
        for number, (start, stop) in enumerate(query_blocks):
            for left, right in blocks(len(items), gallery_slice):
                near = _nearest_in_slice(
                    queries.part(start, stop), gallery.part(left, right), found[number], n_items, workspace
                )
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


def _nearest_in_slice(queries: _Side, gallery: _Side, found: Neighbours, n_items: int, workspace: Tensor) -> Neighbours:
    """The nearest of one slice, except items that are surely further than the n-th one found so far."""
    n_queries, n_gallery = len(queries.items), len(gallery.items)
    group = _group_size(n_gallery, n_items)
    n_groups = -(-n_gallery // group)
    padded = workspace[: n_queries * n_groups * group].view(n_queries, n_groups * group)
    padded[:, n_gallery:] = torch.inf
    relative_squared_tile(queries.embeddings, gallery.embeddings, gallery.norms.square().float(), padded[:, :n_gallery])
    padded[_excluded_pairs(queries, gallery)] = torch.inf
    error = relative_squared_error(queries.norms.square(), float(gallery.norms.max()), queries.embeddings.shape[1])
    minima = padded.view(n_queries, n_groups, group).amin(dim=2)
    # An item at float32 distance <= limit has a true squared distance of at most limit^2 (1 + 2^-24)^2.
    beyond = found.distances[:, -1].double().square() * (1 + 2.0**-22) - queries.norms.square() * (1 - 2.0**-40) + error
    bound = torch.minimum(_nth_smallest(padded, minima, n_items).double() + 2 * error, beyond)
    rows, columns = _entries_up_to(padded, minima, bound)
    distances = exact_pair_distances(queries.embeddings, gallery.embeddings, rows, columns)
    return _first_of_each_row(rows, gallery.items[columns], distances, n_queries, n_items)


def _group_size(n_gallery: int, n_items: int) -> int:
    """Columns per group: as many as leave clearly more groups than neighbours, at most two cache lines."""
    group = LARGEST_GROUP
    while group > 1 and n_gallery < 4 * n_items * group:
        group //= 2
    return group


def _nth_smallest(padded: Tensor, minima: Tensor, n_items: int) -> Tensor:
    """The n-th smallest entry of each row (inf if there are fewer), exactly.

    The entries up to it lie in the n groups with the smallest minima (a group left out has a minimum, thus n
    groups have entries, not below it), so only these groups are searched.
    """
    n_queries, n_groups = minima.shape
    group = padded.shape[1] // n_groups
    if padded.shape[1] < n_items:
        return torch.full((n_queries,), torch.inf, device=padded.device)
    chosen = minima.topk(min(n_items, n_groups), dim=1, largest=False, sorted=False).indices
    flat = chosen + n_groups * torch.arange(n_queries, device=padded.device)[:, None]
    values = padded.view(-1, group).index_select(0, flat.flatten()).view(n_queries, -1)
    return values.kthvalue(n_items, dim=1).values


def _entries_up_to(
    padded: Tensor, minima: Tensor, bound: Tensor
) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]:
    """Rows and columns, ascending, of all finite entries that do not exceed the bound of their row."""
    n_groups = minima.shape[1]
    group = padded.shape[1] // n_groups
    # Rounded up to float32: a bound that is too high only costs a few exact distances.
    rounded = bound.clamp(max=torch.finfo(torch.float32).max).float()
    rounded = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    rounded.clamp_(max=torch.finfo(torch.float32).max)
    rows, groups = (minima <= rounded[:, None]).nonzero(as_tuple=True)
    values = padded.view(-1, group).index_select(0, rows * n_groups + groups)
    entry, offset = (values <= rounded[rows][:, None]).nonzero(as_tuple=True)
    return rows[entry], groups[entry] * group + offset


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
