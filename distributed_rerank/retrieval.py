"""The nearest gallery items of every query: blocks of queries against tiles of the gallery.

A block of queries meets one tile after the other and keeps its best so far, so memory is bounded by a block
and a tile, whatever the size of the gallery. The answer is exact and the same bits for any block size, tile
size or worker count. An approximate search compares a query with the items of a few cells only, by the same rule; how
many cells is chosen on a sample of the queries, and what they miss is measured on another.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distributed_rerank.approximate import N_SAMPLED, in_cells
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.search_sides import SearchSide, Side, StoredSide
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime import logs
from distributed_rerank.runtime.devices import InferenceThreads, pick_device, tensor_of
from distributed_rerank.runtime.profiling import traced
from distributed_rerank.runtime.progress import progress
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.artifacts import BlockStore, Staging
from distributed_rerank.storage.begun import ComputedWith
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate
from distributed_rerank.tensors.cells import Cells
from distributed_rerank.tensors.knn import QUERY_BLOCK, Tile, search_cells, search_tiles

logger = logging.getLogger(__name__)

QUERY_BLOCK_ON_GPU = 1024
"""Queries in one product there: four times the CPU's, for a GPU is idle while a product starts."""
_SHARE_FOR_TILES = 0.5
"""Of a GPU's memory; the rest is for products and for other processes."""
QUERIES_PER_APPROXIMATE_BLOCK = 8192
"""So that some of a block's queries meet in each cell."""


@dataclass(frozen=True)
class SearchedBlock:
    """The candidate lists of a block of queries."""

    lists: CandidateLists
    computed_with: ComputedWith | None = None
    """None = by this process for workers that it did not start."""


QueryBlock = tuple[int, tuple[int, int]]
"""Number of a block and its (start, stop) among the queries."""


@runtime_checkable
class SearchExecutors(Protocol):
    """Search blocks of queries, in this process or elsewhere."""

    def search_blocks(
        self, blocks: Sequence[QueryBlock], queries: Side, gallery: Side, n_items: int, work: WorkConfig
    ) -> Iterator[tuple[int, SearchedBlock]]:
        """The candidate lists of these blocks by number, in any order."""
        ...


class Searcher:
    """Searches the tiles that `tiles` yields anew for each block. A plain class: Ray makes actors of it."""

    def __init__(
        self,
        tiles: Callable[[], Iterable[SearchSide]],
        n_items: int,
        n_threads: int,
        device: torch.device | None = None,
        cells: Cells | None = None,
    ) -> None:
        self._tiles = tiles
        self._cells = cells
        self._n_items = n_items
        self._n_threads = n_threads
        self._device = device or pick_device()
        self._threads = InferenceThreads(n_threads)
        self._kept: dict[int, Tile] = {}
        self._query_block = QUERY_BLOCK_ON_GPU if self._device.type == "cuda" else QUERY_BLOCK

    def search(self, queries: SearchSide) -> SearchedBlock:
        """The nearest items of each query by (distance, item), never itself nor its own sequence."""
        n_rows = -(-len(queries.items) // self._n_threads)
        parts = [queries.part(start, stop) for start, stop in sharding.blocks(len(queries.items), max(1, n_rows))]
        with traced("search"):
            lists = concatenate(self._threads.map(self._search_part, parts or [queries]))
        return SearchedBlock(lists, ComputedWith(self._device.type))

    def _search_part(self, queries: SearchSide) -> CandidateLists:
        embeddings, items, sequences = self._tensors(queries)
        if self._cells is not None:
            lists = search_cells(
                embeddings, self._tiles_on_device(), self._cells, query_items=items, query_sequences=sequences,
                n_items=self._n_items,
            )  # fmt: skip
            # Queries whose cells have too few items, without those of their own sequence, are compared with all items.
            short = (lists.items[:, -1] < 0).nonzero()[:, 0]
            if len(short):
                whole = self._search_all(embeddings[short], items[short], sequences[short])
                lists.items[short], lists.distances[short] = whole.items, whole.distances
            return lists.cpu()
        return self._search_all(embeddings, items, sequences).cpu()

    def _search_all(self, embeddings: Tensor, items: Tensor, sequences: Tensor) -> CandidateLists:
        return search_tiles(
            embeddings,
            self._tiles_on_device(),
            query_items=items,
            query_sequences=sequences,
            n_items=self._n_items,
            query_block=self._query_block,
        )

    def _tiles_on_device(self) -> Iterator[Tile]:
        """The tiles; a GPU keeps as many of them as fit a part of its memory, since copies take longer than search."""
        number = 0
        for tile in self._tiles():  # not enumerated: that would hold a tile while the next one is read
            tensors = self._kept.get(number) or self._tensors(tile)
            if self._has_room_for(tile.embeddings.nbytes):
                self._kept[number] = tensors
            number += 1
            yield tensors
            del tile, tensors

    def _has_room_for(self, n_bytes: int) -> bool:
        if self._device.type != "cuda":
            return False
        free, whole = torch.cuda.mem_get_info(self._device)
        return free - n_bytes > whole * (1 - _SHARE_FOR_TILES)

    def _tensors(self, side: SearchSide) -> tuple[Tensor, Tensor, Tensor]:
        embeddings, items, sequences = map(tensor_of, (side.embeddings, side.items, side.sequences))
        return embeddings.to(self._device), items.to(self._device), sequences.to(self._device)


def search_blocks(
    blocks: Sequence[QueryBlock],
    queries: Side,
    gallery: Side,
    n_items: int,
    work: WorkConfig,
    device: torch.device | None = None,
) -> Iterator[tuple[int, SearchedBlock]]:
    """The candidate lists of these blocks, searched in this process, one block after the other.

    `device` is by default the one that this process sees.
    """
    searcher = Searcher(
        lambda: tiles_of(gallery, work.tile_size), n_items, work.threads_per_worker, device, gallery.cells
    )
    for number, (start, stop) in blocks:
        with logs.about(block=number):
            found = searcher.search(queries.part(start, stop))
        yield number, found


def tiles_of(gallery: Side, tile_size: int) -> Iterator[SearchSide]:
    """The gallery in tiles of `tile_size` items, one in memory at a time."""
    for start, stop in sharding.blocks(len(gallery.items), tile_size):
        yield gallery.part(start, stop)


def retrieve(
    catalogue: Catalogue,
    embeddings: Embeddings,
    n_items: int,
    out: str | Path,
    *,
    recall: float | None = None,
    work: WorkConfig | None = None,
    executors: SearchExecutors | None = None,
    overwrite: bool = False,
) -> CandidateLists:
    """The `n_items` nearest gallery items of each query, kept as candidates.parquet in the folder `out`.

    Computed by `executors`, by default in this process. Queries and gallery items without an embedding (rejects) take
    no part. Lists are shorter where fewer items are possible; a query with none is not in the result. A killed run
    continues with the next block. With `recall` the search is approximate: it finds about that share of the nearest
    items, with their exact distances; what share was measured is in the manifest (`search`).

    Raises BadInput for no query, no gallery item, and a folder that is damaged or was made from other inputs
    (`overwrite` recomputes it).
    """
    work = work or WorkConfig()
    settings = retrieval_settings(n_items, work, recall)
    work = replace(work, queries_per_block=settings["queries_per_search_block"])
    fingerprint = artifacts.make_fingerprint(
        "retrieve", **settings, catalogue=catalogue.digest(), embeddings=embeddings.digest
    )
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        return read_candidates(out, catalogue)
    queries, gallery = _sides(catalogue, embeddings)
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        search, told = _Search(executors, work, staging), {}
        if recall is not None and len(queries.items) <= 2 * N_SAMPLED:
            logger.info("%d queries: as few are searched for exactly", len(queries.items))
        elif recall is not None:
            gallery, found = in_cells(queries, gallery, n_items, recall, staging.blocks("centres"), search.blocks)
            told = {"search": found}
        in_table = partial(candidates_table, ids=catalogue.ids)
        store = search.blocks("candidates", queries, gallery, n_items, in_table)
        rows = tables.write_batches(staging.path / "candidates.parquet", store.tables(), "candidates")
        staging.finish(told, rows=rows)
    return read_candidates(out, catalogue)


@dataclass(frozen=True)
class _Search:
    """Searches by blocks of queries, done by the executors of a stage."""

    executors: SearchExecutors | None
    work: WorkConfig
    staging: Staging

    def blocks(
        self,
        name: str,
        queries: StoredSide,
        gallery: Side,
        n_items: int,
        in_table: Callable[[CandidateLists], pa.Table],
    ) -> BlockStore:
        """The block results `name`: a table of the candidate lists of each block, searched for if it is not there."""
        store, title = self.staging.blocks(name), "retrieval" if name == "candidates" else f"retrieval, {name}"
        plan = dict(enumerate(sharding.blocks(len(queries.items), self.work.queries_per_search_block)))
        todo = {number: block for number, block in plan.items() if number not in store.done()}
        search = search_blocks if self.executors is None else self.executors.search_blocks
        results = search(list(todo.items()), queries, gallery, n_items, self.work)
        for number, result in progress(results, total=len(todo), title=title):
            expected = queries.items[slice(*todo.pop(number))]
            assert np.array_equal(result.lists.query_items.numpy(), expected), (
                f"block {number} came back with other queries"
            )
            if result.computed_with is not None:
                self.staging.remember(result.computed_with)
            store.write(number, in_table(result.lists))
        assert store.done() == plan.keys(), f"blocks {sorted(todo)} never came back"
        return store


def retrieval_settings(n_items: int, work: WorkConfig, recall: float | None = None) -> dict[str, Any]:
    """All settings that can change a candidate list, or the blocks that an interrupted search has left."""
    if recall is None:
        return {"n_items": n_items, **work.fingerprint_settings("retrieve")}
    work = replace(work, queries_per_block=work.queries_per_block or QUERIES_PER_APPROXIMATE_BLOCK)
    return {"n_items": n_items, "recall": recall, **work.fingerprint_settings("retrieve")}


def _sides(catalogue: Catalogue, embeddings: Embeddings) -> tuple[StoredSide, StoredSide]:
    """Queries and gallery, as far as they have an embedding."""
    rows, sides = embeddings.rows_of_all(catalogue.ids), []
    # Where all items are in the gallery and have a row, a range says as much as an array.
    is_whole = isinstance(rows, range) and catalogue.is_gallery.all()
    gallery = range(len(catalogue)) if is_whole else catalogue.gallery_items
    for given, role in ((catalogue.query_items, "query"), (gallery, "gallery item")):
        items = given if isinstance(given, range) or isinstance(rows, range) else given[rows[given] >= 0]
        if len(items) == 0:
            raise BadInput(
                f"{catalogue.source}: no {role} has an embedding; mark some rows or embed this catalogue first"
            )
        sides.append(StoredSide(embeddings.matrix, items, rows, catalogue.sequences))
    return sides[0], sides[1]
