"""--out where nothing can be written: one line with path and advice, before the work where it can be known."""

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_files import EXTRACTOR

from distributed_rerank import extraction
from distributed_rerank.cluster import training as on_ray


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("link", "link is a link; give what it leads to: --out .*/real"),
        ("dangling", "dangling is a link; give what it leads to: --out .*/nowhere"),
        ("file/out", "nothing can be written to .*file .it is a file.; choose another --out"),
        ("file/a/b", "nothing can be written to .*file .it is a file.; choose another --out"),
        ("n" * 230, "name is longer than 200 bytes; give a shorter one"),
        ("/proc/out", "nothing can be written to /proc"),
    ],
)
def test_output_that_cannot_be_written_is_told_before_any_image_is_read(
    places: Path, catalogue_path: Path, run_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    name: str, words: str,
) -> None:  # fmt: skip
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr(extraction, "embed_blocks", refuse)
    outcome = run_job("embed", "--catalogue", catalogue_path, "--out", places / name, *EXTRACTOR)
    assert outcome.code == 2
    line = outcome.errors.strip().splitlines()[-1]
    assert re.search(words, line), line


@contextmanager
def no_file_beyond(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more to a file, as on a full disk; no mount is needed for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TRAIN = ["--epochs", "2", "--steps-per-epoch", "2", "--n-items", "10", "--top-n", "10", "--no-adapt"]
JOBS: dict[str, list[object]] = {"embed": ["--images-per-block", "6"], "train": [*TRAIN]}


@pytest.mark.parametrize(("name", "n_bytes"), [("embed", 9_000), ("train", 60_000)])
def test_full_disk_is_one_line_and_the_same_command_goes_on(
    catalogue_path: Path, run_job: Callable[..., Any], tmp_path: Path, name: str, n_bytes: int
) -> None:
    words = [name, "--catalogue", catalogue_path, *EXTRACTOR, *JOBS[name]]
    with no_file_beyond(n_bytes):
        outcome = run_job(*words, "--out", tmp_path / "out")
    line = outcome.errors.strip().splitlines()[-1]
    assert (outcome.code, "Traceback" in outcome.errors) == (2, False), outcome.errors
    assert line.startswith(f"error: {tmp_path}/"), line
    assert "File too large; make room there, or choose another --out; finished work is kept" in line
    for out in ("out", "whole"):
        outcome = run_job(*words, "--out", tmp_path / out)
        assert outcome.code == 0, outcome.errors
    result = "embeddings.parquet" if name == "embed" else "model.safetensors"
    assert (tmp_path / "out" / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()


def test_full_disk_of_a_training_worker_is_its_answer_and_no_failure_to_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    from training_examples import build_task

    from distributed_rerank.training.task import TrainingWorker

    task = build_task(tmp_path / "task", epochs=1)
    monkeypatch.setattr(on_ray, "join_workers", lambda timeout: TrainingWorker())
    monkeypatch.setattr(on_ray, "broadcast_from_rank_zero", lambda value: value)
    with no_file_beyond(20_000):
        answer = on_ray.train_worker(task, tmp_path / "run", timedelta(seconds=5), {})
    assert answer is not None
    assert answer.startswith(f"{tmp_path}/run/")
    assert "make room there" in answer
