"""Counters of a running evaluation on Ray's own metrics endpoint."""

import re
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import ray

from distributed_rerank.cluster.monitoring import DESCRIPTIONS, counted
from distributed_rerank.procedures.scoring.score import Tally

pytestmark = pytest.mark.ray


def blocks(tally: Tally, sizes: list[int]) -> Iterator[tuple[int, str]]:
    """Numbered blocks whose producer fills the tally: two images are decoded before the first pair is scored."""
    tally.images_decoded += 2
    for number, size in enumerate(sizes):
        tally.pairs_scored += size
        yield number, f"block {number}"


def endpoint() -> str:
    """What the node's metrics endpoint shows."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()


def test_counted_passes_every_block_on(ray_cluster: str) -> None:
    tally = Tally()
    assert list(counted(blocks(tally, [3, 0, 4]), tally)) == [(0, "block 0"), (1, "block 1"), (2, "block 2")]
    assert tally.pairs_scored == 7


@pytest.mark.slow
def test_metrics_endpoint_shows_what_was_counted(ray_cluster: str) -> None:
    def shown(name: str) -> float:
        return sum(
            float(value) for value in re.findall(rf"^ray_{name}_total(?:{{.*}})? (\S+)$", endpoint(), re.MULTILINE)
        )

    wait_for(lambda: "ray_" in endpoint())
    time.sleep(12)  # what an earlier test of this process counted has arrived by now
    before = {name: shown(name) for name in DESCRIPTIONS}
    tally = Tally()
    list(counted(blocks(tally, [300, 0, 40]), tally))
    expected = {"rerank_blocks_done": 3.0, "rerank_pairs_scored": 340.0, "rerank_images_decoded": 2.0}
    wait_for(lambda: {name: shown(name) - before[name] for name in DESCRIPTIONS} == expected)
    assert {name: shown(name) - before[name] for name in DESCRIPTIONS} == expected


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(1)
