import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from distributed_rerank.cluster.executors import RayExecutors
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.scoring.rounds import ScoredBlock, Scoring
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.storage.artifacts import read_manifest
from tests.small_catalogue import concat_model, make_catalogue, make_lists

pytestmark = pytest.mark.ray
SessionOf = Callable[[int], Session]

WORK = WorkConfig(queries_per_block=4, pairs_per_batch=6, encode_batch=3)
FILES = ("pair_distances.parquet", "rejects.parquet")


def _files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_score_three_workers_give_the_bytes_of_one_process(session_of: SessionOf, tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 5 * 4 + 1, broken=(3,)), concat_model()
    lists = make_lists(catalogue, 5)
    score_candidates(catalogue, lists, model, 5, tmp_path / "local", work=replace(WORK, max_rejects=0.1))
    n = 3  # 1, 2 and 3 workers through all stages: tests/jobs/test_same_bytes.py
    executors = RayExecutors(lambda: session_of(n))
    two_blocks = replace(WORK, blocks_per_call=2, max_rejects=0.1)  # as on GPUs; all else here has one
    score_candidates(
        catalogue, lists, model, 5, tmp_path / str(n), work=replace(two_blocks, max_rejects=0.1), executors=executors
    )
    assert _files(tmp_path / str(n)) == _files(tmp_path / "local")
    counts = read_manifest(tmp_path / str(n))["counts"]
    assert (counts["images_decoded"], counts["encodings_computed"]) == (21, 20)
    told = [read_manifest(tmp_path / name)["computed_with"] for name in (str(n), "local")]
    assert told[0] == told[1]
    assert told[0]["precision"] == "float32"


def test_score_in_rounds_gives_the_same_bytes(session_of: SessionOf, tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 17), concat_model()
    lists = make_lists(catalogue, 5)
    score_candidates(catalogue, lists, model, 5, tmp_path / "local", work=WORK)
    small = replace(WORK, encoding_gb=12 * model.bytes_per_image / 10**9)
    executors = RayExecutors(lambda: session_of(2))
    score_candidates(catalogue, lists, model, 5, tmp_path / "rounds", work=small, executors=executors)
    assert _files(tmp_path / "rounds") == _files(tmp_path / "local")
    counts = read_manifest(tmp_path / "rounds")["counts"]
    assert counts["encodings_computed"] - counts["encodings_repeated"] == 17
    assert counts["encodings_repeated"] > 0


def test_score_killed_worker_changes_no_byte(session_of: SessionOf, tmp_path: Path) -> None:
    # A local class travels to the workers by value; they cannot import the tests.
    class Telltale(ConcatSiamese):
        def forward(self, *arguments: Tensor) -> Tensor:
            (tmp_path / f"started_{os.getpid()}").touch()
            return super().forward(*arguments)

    def pids() -> set[int]:
        return {int(path.name.partition("_")[2]) for path in tmp_path.glob("started_*")} - {os.getpid()}

    killed: list[int] = []

    def score(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        for result in RayExecutors(lambda: session_of(2)).score_blocks(run):
            if not killed:
                killed.append(min(pids()))
                os.kill(killed[0], signal.SIGKILL)
            yield result

    catalogue, model = make_catalogue(tmp_path / "images", 60), Telltale(concat_model().config)
    lists = make_lists(catalogue, 5)
    score_candidates(catalogue, lists, model, 5, tmp_path / "local", work=WORK)
    killing = SimpleNamespace(score_blocks=score)
    score_candidates(catalogue, lists, model, 5, tmp_path / "killed", work=WORK, executors=killing)
    assert len(pids()) == 3
    assert _files(tmp_path / "killed") == _files(tmp_path / "local")


def test_score_interrupted_on_ray_continues_to_the_same_bytes(session_of: SessionOf, tmp_path: Path) -> None:
    catalogue, model = make_catalogue(tmp_path / "images", 17), concat_model()
    lists = make_lists(catalogue, 5)
    score_candidates(catalogue, lists, model, 5, tmp_path / "local", work=WORK)

    def dies(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        for done, result in enumerate(RayExecutors(lambda: session_of(2)).score_blocks(run)):
            if done == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        score_candidates(
            catalogue, lists, model, 5, tmp_path / "killed", work=WORK, executors=SimpleNamespace(score_blocks=dies)
        )
    executors = RayExecutors(lambda: session_of(1))
    score_candidates(catalogue, lists, model, 5, tmp_path / "killed", work=WORK, executors=executors)
    assert _files(tmp_path / "killed") == _files(tmp_path / "local")
    assert read_manifest(tmp_path / "killed")["blocks"] == {"computed": 2 * 3, "reused": 2 * 2}


def test_score_lost_block_is_an_error_on_the_driver(session_of: SessionOf, tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 9)

    def loses(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        yield from list(RayExecutors(lambda: session_of(1)).score_blocks(run))[1:]

    with pytest.raises(AssertionError, match="never came back"):
        score_candidates(
            catalogue,
            make_lists(catalogue, 3),
            concat_model(),
            5,
            tmp_path / "out",
            work=WORK,
            executors=SimpleNamespace(score_blocks=loses),
        )
