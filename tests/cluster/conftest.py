"""One private Ray for all tests of this folder."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from distributed_rerank.cluster.session import Session


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray of 8 declared CPUs with its own folder and token; gives its address."""
    # pytest's own temporary folder is too long for Ray's socket paths
    folder = Path(tempfile.mkdtemp(prefix="rerank-test-", dir="/tmp"))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    context = ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=400_000_000,
        include_dashboard=False,
        logging_level=logging.WARNING,
        _temp_dir=str(folder),
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def session_of(ray_cluster: str) -> Callable[[int], Session]:
    """Sessions of so many workers on the tests' Ray."""
    return lambda num_workers: Session(num_workers=num_workers, num_cpus=8, object_store_bytes=400_000_000)
