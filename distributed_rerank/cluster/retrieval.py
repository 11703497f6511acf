"""Retrieval on Ray: each node's object store has the gallery's tiles once, blocks of queries go to actors.

The driver sends names of files and numbers of rows; tasks on its node, where the files are, read the tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed_rerank import retrieval
from distributed_rerank.cluster.fan_out import fan_out, start_workers
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.search_sides import Cut, SearchSide, Side
from distributed_rerank.retrieval import QueryBlock, SearchedBlock, Searcher
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.cells import Cells


class TileSearcher:
    """A Searcher whose tiles come from the object store, one mapped at a time."""

    def __init__(self, tiles: list[ray.ObjectRef], n_items: int, n_threads: int, cells: Cells | None) -> None:
        self._searcher = Searcher(lambda: map(ray.get, tiles), n_items, n_threads, cells=cells)

    def search(self, queries: SearchSide) -> SearchedBlock:
        """The candidate lists of a block of queries."""
        return self._searcher.search(queries)


def search_blocks(
    connect: Callable[[], Session],
    blocks: Sequence[QueryBlock],
    queries: Side,
    gallery: Side,
    n_items: int,
    work: WorkConfig,
) -> Iterator[tuple[int, SearchedBlock]]:
    """The candidate lists of these blocks of queries, searched by the session's workers, as they complete.

    One block against one tile is searched here, on the CPU: it takes a second, and workers take more to start (with a
    GPU six seconds). A search is exact on every device, so this is not noted as another device of the run.
    """
    if len(blocks) <= 1 and len(gallery.items) <= work.tile_size:
        for number, block in retrieval.search_blocks(blocks, queries, gallery, n_items, work, torch.device("cpu")):
            yield number, replace(block, computed_with=None)
        return
    session = connect()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=here)
    cuts = (gallery.cut(*rows) for rows in sharding.blocks(len(gallery.items), work.tile_size))
    tiles = [read.remote(cut) if isinstance(cut, Cut) else ray.put(cut) for cut in cuts]
    needed = replace(session, num_workers=min(session.num_workers, len(blocks)))
    with start_workers(needed, TileSearcher, tiles, n_items, work.threads_per_worker, gallery.cells) as workers:
        yield from fan_out(workers, "search", ((number, (queries.part(*block),)) for number, block in blocks))


def _read(cut: Cut) -> SearchSide:
    return cut.read()
