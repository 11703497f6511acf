"""Training goes on with fewer workers while a node is away, and with all of them once it is back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_rerank.config.cluster import RetryConfig
from distributed_rerank.errors import BadInput

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_training_with_two_then_one_then_two_workers_finishes(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "elastic_driver.py"), str(tmp_path)],
        env=environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["workers"] == [2, 1, 2]
    assert seen["epochs"] >= 3


def test_fewer_workers_than_the_least_are_refused() -> None:
    assert RetryConfig().workers(4) == 4
    assert RetryConfig(min_workers=1).workers(4) == (1, 4)
    assert RetryConfig(min_workers=4).workers(4) == 4
    with pytest.raises(BadInput, match="min_workers=3 exceeds num_workers=2"):
        RetryConfig(min_workers=3).workers(2)
    with pytest.raises(BadInput, match="max_failures=-1 has no end"):
        RetryConfig(max_failures=-1)
