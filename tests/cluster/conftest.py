"""Sessions of workers on the tests' Ray."""

from collections.abc import Callable

import pytest

from distributed_rerank.cluster.session import Session


@pytest.fixture
def session_of(ray_cluster: str) -> Callable[[int], Session]:
    """Sessions of so many workers on the tests' Ray."""
    return lambda num_workers: Session(num_workers=num_workers, num_cpus=8, object_store_bytes=400_000_000)
