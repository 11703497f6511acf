"""Metrics of a running evaluation; what Ray's endpoint shows of a whole one is in tests/jobs/test_same_bytes.py."""

import pytest

from distributed_rerank.cluster.monitoring import ScoringMetrics
from distributed_rerank.scoring.rounds import ScoringCounters

pytestmark = pytest.mark.ray


def test_metrics_grow_by_what_the_counters_have_gained(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gained: dict[str, list[float]] = {}
    metrics, counters = ScoringMetrics(), ScoringCounters(images_decoded=2)
    for name, counter in metrics._exported.items():
        real = counter.inc
        monkeypatch.setattr(
            counter, "inc", lambda value, name=name, real=real: (gained.setdefault(name, []).append(value), real(value))
        )
    for pairs in (3, 0, 4):
        counters.pairs_scored += pairs
        metrics.count_block(counters)
    assert gained == {"rerank_blocks_done": [1, 1, 1], "rerank_pairs_scored": [3, 4], "rerank_images_decoded": [2]}
