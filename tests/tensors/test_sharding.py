"""Blocks and rank shares, exhaustively for small numbers."""

import math
from itertools import pairwise

import pytest

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.sharding import blocks, rank_share, tapering_blocks


def test_blocks_every_small_size_covers_each_item_once_in_order() -> None:
    for n_items in range(121):
        for block_size in range(1, 125):
            planned = blocks(n_items, block_size)
            assert [item for start, stop in planned for item in range(start, stop)] == list(range(n_items))
            assert all(stop - start == block_size for start, stop in planned[:-1])
            assert all(0 < stop - start <= block_size for start, stop in planned)


def test_tapering_blocks_every_small_size_covers_each_item_once_and_ends_in_quarters() -> None:
    for n_items in range(121):
        for block_size in range(1, 40):
            planned = tapering_blocks(n_items, block_size)
            assert [item for start, stop in planned for item in range(start, stop)] == list(range(n_items))
            sizes = [stop - start for start, stop in planned]
            n_whole, quarter = max(0, n_items // block_size - 4), math.ceil(block_size / 4)
            assert sizes[:n_whole] == [block_size] * n_whole
            assert all(size == quarter for size in sizes[n_whole:-1])
            assert all(0 < size <= quarter for size in sizes[n_whole:][-1:])


def test_rank_share_every_small_world_covers_each_item_once_and_evenly() -> None:
    for n_items in range(201):
        for world_size in range(1, 41):
            shares = [rank_share(n_items, rank, world_size) for rank in range(world_size)]
            assert shares[0][0] == 0
            assert shares[-1][1] == n_items
            assert all(before[1] == after[0] for before, after in pairwise(shares))
            sizes = [stop - start for start, stop in shares]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("n_items", "block_size", "named"), [(5, 0, "0"), (5, -2, "-2"), (-1, 3, "-1")])
def test_blocks_impossible_numbers_are_bad_input(n_items: int, block_size: int, named: str) -> None:
    for cut in (blocks, tapering_blocks):
        with pytest.raises(BadInput, match=named):
            cut(n_items, block_size)


@pytest.mark.parametrize(("rank", "world_size"), [(3, 3), (-1, 3), (0, 0)])
def test_rank_share_unknown_rank_is_bad_input(rank: int, world_size: int) -> None:
    with pytest.raises(BadInput, match=f"rank {rank}"):
        rank_share(10, rank, world_size)
