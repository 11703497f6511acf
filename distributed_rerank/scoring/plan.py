"""How pairs are scored: which pairs belong together, and which images they need. Integers only.

Images are ordered by their first use and cut into fixed *batches*, which are decoded and encoded together; score blocks
name the batches that they need. Neither depends on workers, on the memory budget or on what an earlier run finished, so
an encoding has the same bits in every run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists


@dataclass(frozen=True)
class ScoreBlock:
    """Some queries with their first candidates."""

    lists: CandidateLists
    batches: Int64[np.ndarray, " batch"]
    """The image batches that hold the block's images, ascending."""

    def images(self) -> Int64[Tensor, " image"]:
        """The distinct items of the block, ascending."""
        items = torch.cat([self.lists.query_items, self.lists.items.flatten()]).unique()
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
    rows_of_blocks = [order[start:stop] for start, stop in cut(len(order), queries_per_block)]
    used = [np.concatenate([queries[rows], items[rows].ravel()]) for rows in rows_of_blocks]
    images = _in_order_of_first_use(np.concatenate([np.empty(0, np.int64), *used]))
    # [image]: the images in ascending order, and which is which batch's.
    order_of_items = np.argsort(images)
    ascending, batch_of = images[order_of_items], order_of_items // images_per_batch
    blocks = []
    for rows, needed in zip(rows_of_blocks, used, strict=True):
        batches = np.unique(batch_of[np.searchsorted(ascending, needed[needed >= 0])])
        blocks.append(ScoreBlock(lists[torch.from_numpy(rows)], batches))
    return ScorePlan(images, images_per_batch, tuple(blocks))


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
    """Queries that are a few seconds of work for a CPU core: enough to hide Ray, few enough to share out and resume."""
    pairs = 2000 / max(gflop_per_pair, 0.25)
    return max(1, round(pairs / top_n))


def pairs_per_batch(gflop_per_pair: float, is_gpu: bool) -> int:
    """Pairs in one call of the model: what stays in a CPU's cache (8 for a ViT-S/16 on both images), on a GPU more."""
    pairs = 80 / max(gflop_per_pair, 0.1)
    return int(np.clip(pairs * (64 if is_gpu else 1), 8, 8192 if is_gpu else 512))


def _in_order_of_first_use(items: np.ndarray) -> Int64[np.ndarray, " image"]:
    """The distinct items, without -1."""
    distinct, first = np.unique(items[items >= 0], return_index=True)
    return distinct[np.argsort(first)].astype(np.int64)


def _hash(items: np.ndarray, seed: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    value = items.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
