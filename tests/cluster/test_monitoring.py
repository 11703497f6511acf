"""Counters of a running evaluation; what Ray's endpoint shows of a whole one is in tests/jobs/test_same_bytes.py."""

from collections.abc import Iterator

import pytest

from distributed_rerank.cluster.monitoring import with_prometheus_counters
from distributed_rerank.scoring.score import ScoringCounters

pytestmark = pytest.mark.ray


def blocks(counters: ScoringCounters, sizes: list[int]) -> Iterator[tuple[int, str]]:
    """Numbered blocks whose producer fills the counters: two images are decoded before the first pair is scored."""
    counters.images_decoded += 2
    for number, size in enumerate(sizes):
        counters.pairs_scored += size
        yield number, f"block {number}"


def test_counted_passes_every_block_on(ray_cluster: str) -> None:
    counters = ScoringCounters()
    assert list(with_prometheus_counters(blocks(counters, [3, 0, 4]), counters)) == [
        (0, "block 0"),
        (1, "block 1"),
        (2, "block 2"),
    ]
    assert counters.pairs_scored == 7
