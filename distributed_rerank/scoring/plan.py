"""How pairs are scored: which pairs belong together, and which images they need. Integers only.

Images are ordered by their first use and cut into fixed *batches*, which are decoded and encoded together; score blocks
name the batches that they need. Neither depends on workers, on the memory budget or on what an earlier run finished, so
an encoding has the same bits in every run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists

_QUERIES_PER_HASH = 1 << 14
"""Whose candidates are hashed together."""


@dataclass(frozen=True)
class ScoreBlock:
    """Some queries with their first candidates."""

    everything: CandidateLists
    """The lists of all queries, one in memory for all blocks."""
    rows: Int64[np.ndarray, " query"]
    """Those of the block."""
    batches: Int64[np.ndarray, " batch"]
    """The image batches that hold the block's images, ascending."""

    @property
    def lists(self) -> CandidateLists:
        """The block's lists, copied each time."""
        return self.everything[torch.from_numpy(self.rows)]

    def images(self) -> Int64[Tensor, " image"]:
        """The distinct items of the block, ascending."""
        lists = self.lists
        items = torch.cat([lists.query_items, lists.items.flatten()]).unique()
        return items[items >= 0]


@dataclass(frozen=True)
class ScorePlan:
    """All score blocks and the images they need."""

    items: Int64[np.ndarray, " image"]
    """The distinct images, in the order of their first use."""
    images_per_batch: int
    blocks: tuple[ScoreBlock, ...]

    def batch(self, number: int) -> Int64[np.ndarray, " image"]:
        """The items of one image batch."""
        return self.items[number * self.images_per_batch : (number + 1) * self.images_per_batch]

    def batches(self, numbers: Sequence[int]) -> Int64[np.ndarray, " batch"]:
        """The image batches that these score blocks need, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *(self.blocks[number].batches for number in numbers)]))

    def rounds(self, numbers: Sequence[int], max_images: int) -> Iterator[list[int]]:
        """Cut the score blocks into rounds whose images fit in memory together; a round has at least one block."""
        now: list[int] = []
        needed: set[int] = set()
        for number in numbers:
            own = set(self.blocks[number].batches.tolist())
            if now and len(needed | own) * self.images_per_batch > max_images:
                yield now
                now, needed = [], set()
            now.append(number)
            needed |= own
        if now:
            yield now


def make_plan(
    lists: CandidateLists, *, top_n: int, queries_per_block: int, images_per_batch: int, tapers: bool = False
) -> ScorePlan:
    """The plan that scores the first `top_n` candidates of each query; queries without candidates have no block.

    With `tapers` the last blocks are shorter, so that workers end at nearly the same time.
    """
    lists = lists.first(top_n)
    queries, items, _ = lists.arrays()
    # [query]: rows in the order of scoring, without empty lists; cut into the rows of each block.
    order = by_common_candidates(items)
    order = order[items[order, 0] >= 0] if items.shape[1] else order[:0]
    cut = sharding.tapering_blocks if tapers else sharding.blocks
    # [item]: the place of each image in the order of first use; -1 = not used yet.
    place_of = np.full(max(queries.max(initial=-1), items.max(initial=-1)) + 1, -1, np.int32)
    images, blocks, n_images = [np.empty(0, np.int64)], [], 0
    for start, stop in cut(len(order), queries_per_block):
        rows = order[start:stop]
        needed = np.concatenate([queries[rows], items[rows].ravel()])
        needed = needed[needed >= 0]
        images.append(_in_order_of_first_use(needed[place_of[needed] < 0]))
        place_of[images[-1]] = n_images + np.arange(len(images[-1]))
        n_images += len(images[-1])
        batches = np.unique(place_of[needed] // images_per_batch).astype(np.int64)
        blocks.append(ScoreBlock(lists, rows, batches))
    return ScorePlan(np.concatenate(images), images_per_batch, tuple(blocks))


def by_common_candidates(items: Int[np.ndarray, "query top_n"], n_hashes: int = 4) -> Int64[np.ndarray, " query"]:
    """An order of the rows that brings those with common candidates together (MinHash, Broder 1997).

    Two rows agree in one hash with the probability of the Jaccard index of their candidates; rows are sorted
    by their hashes, then by position. Block by block fewer images are then needed.
    """
    # [hash, query], some queries at a time.
    keys = np.empty((n_hashes, len(items)), np.uint64)
    for start, stop in sharding.blocks(len(items), _QUERIES_PER_HASH):
        part = items[start:stop]
        for seed in range(1, n_hashes + 1):
            hashed = _hash(part, seed)
            hashed[part < 0] = np.iinfo(np.uint64).max
            keys[seed - 1, start:stop] = hashed.min(axis=1, initial=np.iinfo(np.uint64).max)
    return np.lexsort(keys[::-1]).astype(np.int64)


def queries_per_block(top_n: int, gflop_per_pair: float) -> int:
    """Queries that are a few seconds of work for a CPU core: enough to hide Ray, few enough to share out and resume."""
    pairs = 2000 / max(gflop_per_pair, 0.25)
    return max(1, round(pairs / top_n))


def pairs_per_batch(gflop_per_pair: float, is_gpu: bool) -> int:
    """Pairs in one call of the model: what stays in a CPU's cache (8 for a ViT-S/16 on both images), on a GPU more."""
    pairs = 80 / max(gflop_per_pair, 0.1)
    return int(np.clip(pairs * (64 if is_gpu else 1), 8, 8192 if is_gpu else 512))


def _in_order_of_first_use(items: np.ndarray) -> Int64[np.ndarray, " image"]:
    """The distinct items."""
    distinct, first = np.unique(items, return_index=True)
    return distinct[np.argsort(first)].astype(np.int64)


def _hash(items: np.ndarray, seed: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    value = items.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
