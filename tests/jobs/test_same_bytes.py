"""The same bytes from one process and from 1, 2 and 3 Ray workers, and what Prometheus is told meanwhile."""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from job_files import EXTRACTOR, SMALL_BLOCKS, bytes_of, wait_until

from distributed_rerank.cluster.monitoring import DESCRIPTIONS

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def exported() -> dict[str, float]:
    """Our counters on the metrics endpoint of this node, summed over processes."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=20) as answer:
        page = answer.read().decode()
    found = {}
    for name in DESCRIPTIONS:
        values = re.findall(rf"^ray_{name}_total(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        found[name] = sum(float(value) for value in values)
    return found


def test_files_are_equal_for_any_number_of_workers_and_counters_tell_the_work(
    catalogue_path: Path, models: dict[str, Path], run_job: Callable, ray_cluster: str, tmp_path: Path
) -> None:
    def evaluate(name: str, *arguments: object, on_ray: bool) -> dict[str, bytes]:
        outcome = run_job(
            "evaluate", "--catalogue", catalogue_path, "--out", tmp_path / name, *EXTRACTOR, *SMALL_BLOCKS,
            "--model", models["concat"], *arguments, on_ray=on_ray,
        )  # fmt: skip
        assert outcome.code == 0, outcome.errors
        return bytes_of(tmp_path / name)

    expected = evaluate("one process", on_ray=False)
    assert set(expected) == {"metrics.json", "per_query.parquet", "reranked.parquet", "rejects.parquet"}
    time.sleep(12)  # what an earlier test of this process counted has been exported by now
    before = exported()
    for n in (1, 2, 3):
        assert evaluate(f"{n} workers", "--num-workers", n, on_ray=True) == expected
    manifests = [json.loads((tmp_path / f"{n} workers/pair_distances/manifest.json").read_text()) for n in (1, 2, 3)]
    counts = {
        "rerank_blocks_done": sum(manifest["blocks"]["computed"] // 2 for manifest in manifests),
        "rerank_pairs_scored": sum(manifest["counts"]["pairs_scored"] for manifest in manifests),
        "rerank_images_decoded": sum(manifest["counts"]["images_decoded"] for manifest in manifests),
    }
    wait_until(lambda: {name: value - before[name] for name, value in exported().items()} == counts, seconds=60)
    assert {name: value - before[name] for name, value in exported().items()} == counts
    assert json.loads(expected["metrics.json"])["cost"]["pairs"] * 3 == counts["rerank_pairs_scored"] > 0
    rounds = evaluate("small budget", "--encoding-gb", 0.00005, "--decode-threads", 2, on_ray=False)
    assert rounds == expected
