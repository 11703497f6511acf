"""How pairs are scored, which are scored together and which images they need. Integers only. Layer 3.

Images are ordered by their first use and cut into fixed *batches*, the unit that is decoded and encoded
together; score blocks name the batches they need. Neither depends on workers, on the memory budget or on what
an earlier run finished, so an encoding has the same bits in every run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.tensors import sharding


@dataclass(frozen=True)
class ScoreBlock:
    """Some queries with their first candidates. Images are places in `ScorePlan.items`; -1 = no candidate."""

    rows: Int64[np.ndarray, " query"]
    """Rows of these queries in the candidate lists."""
    queries: Int64[np.ndarray, " query"]
    candidates: Int64[np.ndarray, "query top_n"]
    distances: Float32[np.ndarray, "query top_n"]

    def places(self) -> Int64[np.ndarray, " image"]:
        """The distinct images of the block, ascending."""
        return np.unique(np.concatenate([self.queries, self.candidates[self.candidates >= 0]]))

    @property
    def n_pairs(self) -> int:
        """Pairs to be scored."""
        return int((self.candidates >= 0).sum())


@dataclass(frozen=True)
class ScorePlan:
    """All score blocks and the images they need."""

    items: Int64[np.ndarray, " image"]
    """Item numbers of the distinct images, in the order of their first use."""
    images_per_batch: int
    blocks: tuple[ScoreBlock, ...]

    def batches(self, numbers: Sequence[int]) -> Int64[np.ndarray, " batch"]:
        """The image batches that these score blocks need, ascending."""
        needed = [self.blocks[number].places() // self.images_per_batch for number in numbers]
        return np.unique(np.concatenate([np.empty(0, np.int64), *needed]))

    def batch_places(self, batch: int) -> range:
        """The places of the images of one batch."""
        start = batch * self.images_per_batch
        return range(start, min(start + self.images_per_batch, len(self.items)))

    def rounds(self, numbers: Sequence[int], max_images: int) -> Iterator[list[int]]:
        """Cut the score blocks into rounds whose images fit in memory together; a round has at least one
        block."""
        now: list[int] = []
        needed: set[int] = set()
        for number in numbers:
            more = needed | set(self.batches([number]).tolist())
            if now and len(more) * self.images_per_batch > max_images:
                yield now
                now, more = [], set(self.batches([number]).tolist())
            now.append(number)
            needed = more
        if now:
            yield now


def make_plan(
    lists: CandidateLists, *, top_n: int, queries_per_block: int, images_per_batch: int, tapers: bool = False
) -> ScorePlan:
    """The plan that scores the first `top_n` candidates of each query; queries without candidates have no
    block.

    With `tapers` the last blocks are shorter, so that workers end at nearly the same time.
    """
    order = by_common_candidates(lists.items[:, :top_n])
    order = order[lists.items[order, 0] >= 0] if lists.items.shape[1] else order[:0]
    cut = sharding.tapering_blocks if tapers else sharding.blocks
    rows = [order[start:stop] for start, stop in cut(len(order), queries_per_block)]
    used = [np.concatenate([lists.query_items[row], lists.items[row, :top_n].ravel()]) for row in rows]
    items = _in_order_of_first_use(np.concatenate([np.empty(0, np.int64), *used]))
    # The last entry stands for "no candidate", item -1.
    place = np.full(int(items.max(initial=-1)) + 2, -1, np.int64)
    place[items] = np.arange(len(items))
    queries, candidates = place[lists.query_items], place[lists.items[:, :top_n]]
    blocks = (ScoreBlock(row, queries[row], candidates[row], lists.distances[row, :top_n]) for row in rows)
    return ScorePlan(items, images_per_batch, tuple(blocks))


def by_common_candidates(items: Int64[np.ndarray, "query top_n"], n_hashes: int = 4) -> Int64[np.ndarray, " query"]:
    """An order of the rows that brings those with common candidates together (MinHash, Broder 1997).

    Two rows agree in one hash with the probability of the Jaccard index of their candidates; rows are sorted
    by their hashes, then by position. Block by block fewer images are then needed.
    """
    keys = []
    for seed in range(1, n_hashes + 1):
        hashed = _hash(items, seed)
        hashed[items < 0] = np.iinfo(np.uint64).max
        keys.append(hashed.min(axis=1, initial=np.iinfo(np.uint64).max))
    return np.lexsort(keys[::-1]).astype(np.int64)


def queries_per_block(top_n: int, gflop_per_pair: float) -> int:
    """Queries that make a few seconds of work for one CPU core: enough to hide Ray, few enough to share out
    and resume."""
    pairs = 2000 / max(gflop_per_pair, 0.25)
    return max(1, round(pairs / top_n))


def pairs_per_batch(gflop_per_pair: float, is_gpu: bool) -> int:
    """Pairs in one call of the model: on a CPU what stays in its cache (8 for a ViT-S/16 on both images), on
    a GPU more."""
    pairs = 80 / max(gflop_per_pair, 0.1)
    return int(np.clip(pairs * (64 if is_gpu else 1), 8, 8192 if is_gpu else 512))


def _in_order_of_first_use(items: np.ndarray) -> Int64[np.ndarray, " image"]:
    distinct, first = np.unique(items[items >= 0], return_index=True)
    return distinct[np.argsort(first)].astype(np.int64)


def _hash(items: np.ndarray, seed: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    value = items.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
