"""Retrieval on Ray: the gallery's tiles lie once in each node's object store, blocks of queries go to actors.
Layer 4."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import ray

from distributed_rerank import retrieval as procedure
from distributed_rerank.cluster.fan_out import fan_out, start_workers
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.retrieval import Block, SearchedBlock, Searcher, SearchSide, tiles_of


class TileSearcher:
    """A Searcher whose tiles come from the object store, one mapped at a time."""

    def __init__(self, tiles: list[ray.ObjectRef], n_items: int, n_threads: int) -> None:
        self._searcher = Searcher(lambda: map(ray.get, tiles), n_items, n_threads)

    def search(self, queries: SearchSide) -> SearchedBlock:
        """The candidate lists of a block of queries."""
        return self._searcher.search(queries)


def search(
    blocks: Sequence[Block],
    queries: SearchSide,
    gallery: SearchSide,
    n_items: int,
    work: WorkConfig,
    *,
    session: Session,
) -> Iterator[tuple[int, SearchedBlock]]:
    """`procedures.retrieval.search` on the session's workers, blocks as they complete.

    One block against one tile is searched here: a second of work, and workers take some to start.
    """
    if len(blocks) <= 1 and len(gallery.items) <= work.tile_size and not session.use_gpu:
        yield from procedure.search(blocks, queries, gallery, n_items, work)
        return
    tiles = [ray.put(tile) for tile in tiles_of(gallery, work.tile_size)]
    needed = replace(session, num_workers=min(session.num_workers, len(blocks)))
    with start_workers(needed, TileSearcher, tiles, n_items, work.threads_per_worker) as workers:
        tasks = ((number, queries.part(start, stop)) for number, (start, stop) in blocks)
        yield from fan_out(workers, lambda worker, part: worker.call("search", part), tasks)
