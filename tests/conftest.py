"""What every test may use: where the shared real data lies, one Ray, one S3 server."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from s3_server import ENVIRONMENT, Server, started

# What ranx compiles at its first use takes a minute, and computes some hundred queries here. Before it is imported.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

ROOT = Path(__file__).resolve().parents[1]

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones, many more of them.
settings.register_profile("project", deadline=None, database=None, derandomize=True, max_examples=50)
settings.register_profile("search", deadline=None, database=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real photos and weights, or a skip that says how to give one."""
    folder = Path(os.environ.get("DISTRIBUTED_RERANK_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set DISTRIBUTED_RERANK_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One Ray for all tests of a process: 8 declared CPUs, its own folder and token; gives its address."""
    import ray  # a second that most tests need not wait for

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """One S3 server for all tests of a process."""
    with started() as server:
        yield server


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """That server without faults, an empty bucket of this test's in it, `server.bucket`, and the environment's keys."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_server.address}.items():
        monkeypatch.setenv(name, value)
    s3_server.faults()
    s3_server.make_bucket(f"bucket-{secrets.token_hex(6)}")
    s3_server.requests()
    yield s3_server
    s3_server.faults()
