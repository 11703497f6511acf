from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_rerank.cluster.executors import RayExecutors
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.data.vectors import StoredVectors
from distributed_rerank.errors import BadInput
from distributed_rerank.retrieval import retrieve
from distributed_rerank.storage import begun
from distributed_rerank.storage.artifacts import read_manifest
from distributed_rerank.storage.begun import ComputedWith
from tests.small_catalogue import make_catalogue, planted_embeddings, write_table

pytestmark = pytest.mark.ray
SessionOf = Callable[[int], Session]

WORK = WorkConfig(queries_per_block=4, tile_size=5)


@pytest.mark.parametrize("are_stored", [False, True])
def test_retrieve_three_workers_give_the_bytes_of_one_process(
    session_of: SessionOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_stored: bool
) -> None:
    catalogue = make_catalogue(tmp_path / "images", 3 * 4 + 1)
    matrix = np.random.default_rng(0).standard_normal((13, 8)).astype(np.float32)
    matrix[7] = matrix[2]
    embeddings = Embeddings(catalogue.ids, matrix)
    retrieve(catalogue, embeddings, 4, tmp_path / "local", work=WORK)
    if are_stored:  # tasks read the tiles, in a folder of their own, so that the file must have its whole path
        monkeypatch.chdir(tmp_path)
        write_embeddings("embeddings.parquet", catalogue.ids, matrix)
        embeddings = read_embeddings("embeddings.parquet")
        assert isinstance(embeddings.matrix, StoredVectors)
    n = 3  # 1, 2 and 3 workers through all stages: tests/jobs/test_same_bytes.py
    on_ray = RayExecutors(lambda: session_of(n))
    retrieve(catalogue, embeddings, 4, tmp_path / str(n), work=WORK, executors=on_ray)
    found, expected = (tmp_path / name / "candidates.parquet" for name in (str(n), "local"))
    assert found.read_bytes() == expected.read_bytes()


def test_retrieve_embedding_that_is_not_finite_is_bad_input_on_the_driver(
    session_of: SessionOf, tmp_path: Path
) -> None:
    catalogue = make_catalogue(tmp_path / "images", 6)  # two blocks: one alone is searched by the driver
    embeddings = Embeddings(catalogue.ids, np.full((6, 4), np.nan, np.float32))
    on_ray = RayExecutors(lambda: session_of(1))
    with pytest.raises(BadInput, match="not finite"):
        retrieve(catalogue, embeddings, 4, tmp_path / "out", work=WORK, executors=on_ray)


def test_retrieve_embeddings_that_another_run_adds_to_are_bad_input_and_a_second_start_is_right(
    session_of: SessionOf, tmp_path: Path
) -> None:
    """Workers find rows by number in the file: in the file that took its place they would be other images."""
    catalogue = make_catalogue(tmp_path / "images", 13)
    matrix = np.random.default_rng(0).standard_normal((13, 8)).astype(np.float32)
    path, on_ray = tmp_path / "embeddings.parquet", RayExecutors(lambda: session_of(2))
    write_embeddings(path, catalogue.ids, matrix)
    of_before = read_embeddings(path)
    # What is added comes first by id, and moves all other rows.
    write_embeddings(path, ["!", *catalogue.ids.tolist()], np.concatenate([matrix[:1], matrix]))
    with pytest.raises(BadInput, match=r"embeddings\.parquet: another run has changed these embeddings"):
        retrieve(catalogue, of_before, 4, tmp_path / "out", work=WORK, executors=on_ray)
    retrieve(catalogue, read_embeddings(path), 4, tmp_path / "out", work=WORK, executors=on_ray)
    retrieve(catalogue, Embeddings(catalogue.ids, matrix), 4, tmp_path / "local", work=WORK)
    found, expected = (tmp_path / name / "candidates.parquet" for name in ("out", "local"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("use_gpu", [False, True])
def test_retrieve_one_small_block_starts_no_worker(tmp_path: Path, use_gpu: bool) -> None:
    catalogue = make_catalogue(tmp_path / "images", 4)
    embeddings = Embeddings(catalogue.ids, np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))
    # Its workers could never be placed.
    no_cluster = RayExecutors(lambda: Session(num_workers=10**6, use_gpu=use_gpu))
    found = retrieve(catalogue, embeddings, 4, tmp_path / "ray", work=WORK, executors=no_cluster)
    expected = retrieve(catalogue, embeddings, 4, tmp_path / "local", work=WORK)
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.distances, expected.distances)
    assert read_manifest(tmp_path / "ray")["computed_with"] == {"device": "cpu"}


def test_small_search_fits_a_run_that_was_begun_on_a_gpu(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 4)
    embeddings = Embeddings(catalogue.ids, np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))
    run = tmp_path / "run"
    begun.begin(run)
    begun.remember(run, ComputedWith("cuda", gpu="H100"))
    on_gpu = RayExecutors(lambda: Session(num_workers=1, use_gpu=True))
    assert len(retrieve(catalogue, embeddings, 4, run / "candidates", work=WORK, executors=on_gpu).items) == 4


def test_approximate_search_by_two_workers_gives_the_bytes_of_one_process(
    session_of: SessionOf, tmp_path: Path
) -> None:
    catalogue = write_table(tmp_path, 6000)
    write_embeddings(tmp_path / "embeddings.parquet", catalogue.ids, planted_embeddings(6000))
    embeddings = read_embeddings(tmp_path / "embeddings.parquet")
    assert isinstance(embeddings.matrix, StoredVectors)
    work = WorkConfig(queries_per_block=256, tile_size=1111)
    on_ray = RayExecutors(lambda: session_of(2))
    retrieve(catalogue, embeddings, 20, tmp_path / "local", recall=0.9, work=work)
    retrieve(catalogue, embeddings, 20, tmp_path / "ray", recall=0.9, work=work, executors=on_ray)
    found, expected = (tmp_path / name / "candidates.parquet" for name in ("ray", "local"))
    assert found.read_bytes() == expected.read_bytes()
    figures = [read_manifest(tmp_path / name)["search"] for name in ("ray", "local")]
    assert figures[0] == figures[1]
    assert figures[0]["probes"] < figures[0]["cells"]
