"""Counters of a running evaluation; what Ray's endpoint shows of a whole one is in tests/jobs/test_same_bytes.py."""

from collections.abc import Iterator

import pytest

from distributed_rerank.cluster.monitoring import counted
from distributed_rerank.procedures.scoring.score import Tally

pytestmark = pytest.mark.ray


def blocks(tally: Tally, sizes: list[int]) -> Iterator[tuple[int, str]]:
    """Numbered blocks whose producer fills the tally: two images are decoded before the first pair is scored."""
    tally.images_decoded += 2
    for number, size in enumerate(sizes):
        tally.pairs_scored += size
        yield number, f"block {number}"


def test_counted_passes_every_block_on(ray_cluster: str) -> None:
    tally = Tally()
    assert list(counted(blocks(tally, [3, 0, 4]), tally)) == [(0, "block 0"), (1, "block 1"), (2, "block 2")]
    assert tally.pairs_scored == 7
