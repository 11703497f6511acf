"""What a running evaluation has done so far, as Prometheus metrics of Ray's own endpoint. Layer 4.

Ray exports them on every node, named `ray_rerank_..._total`, within about ten seconds; the file
prom_metrics_service_discovery.json in Ray's folder lists the endpoints for Prometheus.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from ray.util.metrics import Counter

from distributed_rerank.scoring.score import ScoringCounters

T = TypeVar("T")

DESCRIPTIONS = {
    "rerank_blocks_done": "blocks of queries whose pairs are scored",
    "rerank_pairs_scored": "pairs that a pairwise model has scored",
    "rerank_images_decoded": "images that were read for a pairwise model, again where they were encoded again",
}


def with_prometheus_counters(blocks: Iterable[T], counters: ScoringCounters) -> Iterator[T]:
    """`blocks` as they come, while the metrics follow `counters`, which their producer fills."""
    exported = {name: Counter(name, description) for name, description in DESCRIPTIONS.items()}
    reported = {"rerank_pairs_scored": 0, "rerank_images_decoded": 0}
    for block in blocks:
        exported["rerank_blocks_done"].inc()
        now = {"rerank_pairs_scored": counters.pairs_scored, "rerank_images_decoded": counters.images_decoded}
        for name, value in now.items():
            if value > reported[name]:
                exported[name].inc(value - reported[name])
        reported = now
        yield block
