"""Exact nearest neighbours by L2 distance: bounded memory, ties by item number, the same bits for any tiling.

Queries are cut into blocks and the gallery, which comes in tiles, into slices. For each block and slice the module
`candidate_pairs` names every pair that may be among the nearest; each of these gets its exact distance, computed alone.
Distances and order come from the exact distances only, so neither block and tile sizes nor the number format of the
matrix product change the result.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate, empty_lists
from distributed_rerank.tensors.candidate_pairs import (
    LARGEST_GROUP,
    Side,
    candidate_pairs,
    checked_side,
    rounded_slice,
    sorted_by_item,
)
from distributed_rerank.tensors.cells import Cells
from distributed_rerank.tensors.distances import exact_pair_distances, rounded_queries
from distributed_rerank.tensors.hardware import bf16_support
from distributed_rerank.tensors.ragged import places_in_rows
from distributed_rerank.tensors.sharding import blocks

QUERY_BLOCK = 256
GALLERY_SLICE = 65_536
SMALLEST_ROUNDED = 2**24
"""Multiplications of a product below which rounding its factors costs more than it saves."""

Tile = tuple[Tensor, Tensor, Tensor | None]
"""Embeddings [item, dim], item numbers [item] and sequences [item] (or None) of a part of the gallery."""


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
) -> CandidateLists:
    """The `n_items` nearest gallery items of each query by L2 distance (not squared), ties by item number.

    Left out are the query's own item (the same number) and items of its own sequence (-1 = no sequence). A row with
    fewer items is filled up with -1 and inf, so `n_items` may exceed the gallery. Gallery items are distinct; their
    order does not matter. Memory beside the inputs: a few times `query_block` x `gallery_slice` x 4 bytes. Neither size
    changes a bit of the answer. Raises BadInput for `n_items` below 1 and for an embedding that is not finite or longer
    than 2^60.
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
) -> CandidateLists:
    """`nearest` in a gallery that comes as tiles, one at a time, in any order.

    Distances found in earlier tiles limit the search in later ones, which so cost little more than their matrix
    product. Order and size of the tiles do not change a bit of the answer.
    """
    if n_items < 1:
        raise BadInput(f"n_items={n_items} retrieves nothing; ask for at least 1")
    queries = checked_side(query_embeddings, query_items, query_sequences)
    is_rounded = bf16_support(query_embeddings.device) is not None and query_embeddings.device.type == "cpu"
    queries = replace(queries, rounded=rounded_queries(query_embeddings)) if is_rounded else queries
    query_blocks = blocks(len(query_items), query_block)
    # The nearest so far of each block of queries, [query, n_items] each.
    best = [empty_lists(query_items[start:stop], n_items) for start, stop in query_blocks]
    workspace = torch.empty(0, device=query_embeddings.device)
    for tile in tiles:
        assert (tile[2] is None) == (query_sequences is None), "sequences are given for both sides or for none"
        workspace = _search_tile(queries, tile, best, n_items, query_blocks, gallery_slice, workspace)
        del tile  # or it would stay in memory while the next one is read
    return concatenate([*best, empty_lists(query_items[:0], n_items)])  # without queries there are no blocks


def search_cells(
    query_embeddings: Float[Tensor, "query dim"],
    tiles: Iterable[Tile],
    cells: Cells,
    *,
    query_items: Int64[Tensor, " query"],
    query_sequences: Int64[Tensor, " query"] | None = None,
    n_items: int,
    query_block: int = QUERY_BLOCK,
) -> CandidateLists:
    """`search_tiles` in which a query meets `cells.n_probes` cells only, those whose centres are nearest to it.

    The tiles are a gallery ordered by (cell, item), from its first row to its last; a cell may go from one tile into
    the next. Lists are exact among the items of the cells, so tiles and devices change no bit. A list is short where
    these have fewer items.
    """
    queries, n_cells = checked_side(query_embeddings, query_items, query_sequences), len(cells.centres)
    rows_of = _rows_by_cell(query_embeddings, cells)
    best = empty_lists(query_items, n_items)
    workspace = torch.empty(0, device=query_embeddings.device)
    starts, end = cells.starts.tolist(), 0
    for tile in tiles:
        gallery = checked_side(*tile)
        start, end = end, end + len(gallery.items)
        cell = bisect.bisect_right(starts, start) - 1
        while cell < n_cells and starts[cell] < end:
            # What lies in this tile of the cell, against the queries that look into it.
            part = gallery[max(starts[cell] - start, 0) : starts[cell + 1] - start]
            is_met = len(part.items) and len(rows_of[cell])
            for rows in rows_of[cell].split(query_block) if is_met else ():
                size = len(rows) * (len(part.items) + LARGEST_GROUP)
                workspace = workspace if workspace.numel() >= size else workspace.new_empty(size)
                so_far = best[rows]
                near = merge(so_far, _nearest_in_slice(queries[rows], part, so_far, n_items, workspace), n_items)
                best.items[rows], best.distances[rows] = near.items, near.distances
            cell += 1
        del tile, gallery
    return best


def _rows_by_cell(query_embeddings: Float[Tensor, "query dim"], cells: Cells) -> Sequence[Int64[Tensor, " row"]]:
    """For each cell the queries that look into it, ascending."""
    n_cells, n_queries = len(cells.centres), len(query_embeddings)
    # A centre is no query: their numbers differ.
    numbers = torch.arange(n_cells + n_queries, device=query_embeddings.device)
    probes = nearest(
        query_embeddings, cells.centres.to(query_embeddings.device), query_items=numbers[n_cells:],
        gallery_items=numbers[:n_cells], n_items=cells.n_probes,
    ).items.flatten()  # fmt: skip
    rows = probes.argsort(stable=True) // cells.n_probes
    return rows.split(torch.bincount(probes, minlength=n_cells).tolist())


def _search_tile(
    queries: Side,
    tile: Tile,
    best: list[CandidateLists],
    n_items: int,
    query_blocks: Sequence[tuple[int, int]],
    gallery_slice: int,
    workspace: Tensor,
) -> Tensor:
    """Merge the nearest of a tile into the `best` of each block of queries; returns the memory for products."""
    gallery = sorted_by_item(checked_side(*tile))
    n_queries, n_tile = len(queries.items), len(gallery.items)
    # One buffer for every product: fresh pages for each would cost as much as half of the product itself.
    size = max((stop - start for start, stop in query_blocks), default=0)
    size *= min(gallery_slice, n_tile) + LARGEST_GROUP
    workspace = workspace if workspace.numel() >= size else workspace.new_empty(size)
    for left, right in blocks(n_tile, gallery_slice):
        part = gallery[left:right]
        if queries.rounded is not None and n_queries * part.embeddings.numel() >= SMALLEST_ROUNDED:
            part = replace(part, rounded=rounded_slice(part, n_items))
        for number, (start, stop) in enumerate(query_blocks):
            near = _nearest_in_slice(queries[start:stop], part, best[number], n_items, workspace)
            best[number] = merge(best[number], near, n_items)
    return workspace


def merge(a: CandidateLists, b: CandidateLists, n_items: int) -> CandidateLists:
    """The first `n_items` of both, row by row, by (distance, item).

    Associative and commutative, so partial results may arrive in any order. No item may be in both.
    """
    # [query, a's + b's columns], at least n_items of them.
    items = torch.cat([a.items, b.items], dim=1)
    distances = torch.cat([a.distances, b.distances], dim=1)
    missing = n_items - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
    # Sort by item first; the stable sort by distance then leaves equal distances in the order of their items.
    by_item = items.argsort(dim=1)
    distances, by_distance = distances.gather(1, by_item).sort(dim=1, stable=True)
    order = by_item.gather(1, by_distance[:, :n_items])
    return replace(a, items=items.gather(1, order), distances=distances[:, :n_items].contiguous())


def _nearest_in_slice(
    queries: Side, gallery: Side, best: CandidateLists, n_items: int, workspace: Tensor
) -> CandidateLists:
    """The nearest of one slice, without items that are surely further than the n-th of `best`."""
    rows, columns = candidate_pairs(queries, gallery, best.distances[:, -1], n_items, workspace)
    distances = exact_pair_distances(queries.embeddings, gallery.embeddings, rows, columns)
    return _first_of_each_row(rows, gallery.items[columns], distances, queries.items, n_items)


def _first_of_each_row(
    rows: Tensor, items: Tensor, distances: Tensor, query_items: Tensor, n_items: int
) -> CandidateLists:
    """The first `n_items` of each row by (distance, item); `rows` ascend, and `items` ascend within a row."""
    # [query, width]: the pairs of each query side by side, filled up to the longest row.
    counts = torch.bincount(rows, minlength=len(query_items))
    place = places_in_rows(rows, counts)
    table = empty_lists(query_items, max(int(counts.max()), 1))
    table.items[rows, place] = items
    table.distances[rows, place] = distances
    # Columns are in item order, so a stable sort leaves equal distances ordered by item.
    ordered, order = table.distances.sort(dim=1, stable=True)
    return replace(table, items=table.items.gather(1, order[:, :n_items]), distances=ordered[:, :n_items])
