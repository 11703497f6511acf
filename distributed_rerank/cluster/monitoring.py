"""What a running evaluation has done so far, as Prometheus metrics of Ray's own endpoint.

Ray exports them on every node, named `ray_rerank_..._total`, within about ten seconds; the file
prom_metrics_service_discovery.json in Ray's folder lists the endpoints for Prometheus.
"""

from ray.util.metrics import Counter

from distributed_rerank.scoring.rounds import ScoringCounters

DESCRIPTIONS = {
    "rerank_blocks_done": "blocks of queries whose pairs are scored",
    "rerank_pairs_scored": "pairs that a pairwise model has scored",
    "rerank_images_decoded": "images that were read for a pairwise model, again where they were encoded again",
}


class ScoringMetrics:
    """The metrics of one scoring run."""

    def __init__(self) -> None:
        self._exported = {name: Counter(name, description) for name, description in DESCRIPTIONS.items()}
        self._reported = dict.fromkeys(DESCRIPTIONS, 0)

    def count_block(self, counters: ScoringCounters) -> None:
        """Count one more block, and what `counters` have gained since the last one."""
        now = {
            "rerank_blocks_done": self._reported["rerank_blocks_done"] + 1,
            "rerank_pairs_scored": counters.pairs_scored,
            "rerank_images_decoded": counters.images_decoded,
        }
        for name, value in now.items():
            if value > self._reported[name]:
                self._exported[name].inc(value - self._reported[name])
        self._reported = now
