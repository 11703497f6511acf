"""Jobs whose catalogue, images, inputs and results lie in a bucket: the bytes of a local run, nothing lost."""

import dataclasses
import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from job_files import EXTRACTOR, bytes_of
from s3_server import Server, put_folder

from distributed_rerank import command_line
from distributed_rerank.config.cluster import ObserveConfig
from distributed_rerank.config.jobs import JOBS
from distributed_rerank.errors import BadInput
from distributed_rerank.jobs import storage
from distributed_rerank.jobs.storage import uri_of
from distributed_rerank.storage import object_store
from distributed_rerank.storage.remote_folders import fetch


@pytest.fixture
def table(s3: Server, catalogue_path: Path) -> str:
    put_folder(catalogue_path.parent, f"{s3.bucket}/photos")
    return f"{s3.bucket}/photos/df.csv"


def test_embed_and_evaluate_in_a_bucket_give_the_bytes_of_a_local_run(
    s3: Server,
    table: str,
    catalogue_path: Path,
    models: dict[str, Path],
    run_job: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    put_folder(models["concat"], f"{s3.bucket}/model")
    local = ["--out", tmp_path / "local", "--embeddings", tmp_path / "embeddings", "--model", models["concat"]]
    images = ["--catalogue", table]  # files of photos are compared with each other on a disk only
    assert run_job("embed", *images, "--out", tmp_path / "embeddings", *EXTRACTOR).code == 0
    outcome = run_job("evaluate", *images, *local)
    assert outcome.code == 0, outcome.errors

    bucket = ["--catalogue", table, "--scratch", tmp_path / "scratch"]
    outcome = run_job("embed", *bucket, "--out", f"{s3.bucket}/runs/embeddings", *EXTRACTOR)
    assert outcome.code == 0, outcome.errors
    s3.requests()
    given = [*bucket, "--embeddings", f"{s3.bucket}/runs/embeddings", "--model", f"{s3.bucket}/model"]
    for scratch in ("scratch", "another machine"):
        here = ["--scratch", tmp_path / scratch, "--out", f"{s3.bucket}/runs/evaluation"]
        outcome = run_job("evaluate", *given, *here, "--markdown", f"{s3.bucket}/runs/table.md")
        assert outcome.code == 0, outcome.errors
    assert "nothing to do" in outcome.errors or not outcome.errors
    assert b"mAP@10" in object_store.read(f"{s3.bucket}/runs/table.md")
    found = fetch(f"{s3.bucket}/runs/evaluation", tmp_path / "fetched")
    assert bytes_of(found) == bytes_of(tmp_path / "local")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("s3")], "no local folder named s3:"
    assert not any(".embeddings.lock" in path for _, path in s3.requests()), "an input is locked by nobody"
    names = {name.partition("/")[0] for name in object_store.sizes(f"{s3.bucket}/runs")}
    assert names == {"embeddings", "evaluation", "table.md"}


def test_wrong_configuration_names_the_uri_and_not_its_copy(
    s3: Server, table: str, run_job: Callable[..., Any], tmp_path: Path
) -> None:
    given = ["--catalogue", table, "--scratch", tmp_path, "--out", f"{s3.bucket}/embeddings", *EXTRACTOR]
    assert run_job("embed", *given).code == 0
    outcome = run_job("embed", *given, "--no-normalise")
    assert outcome.code == 2
    assert f"error: {s3.bucket}/embeddings was made with config.extractor.normalise=true" in outcome.errors
    assert run_job("embed", *given, "--no-normalise", "--overwrite").code == 0
    shutil.rmtree(tmp_path)
    outcome = run_job("evaluate", *given[:4], "--out", tmp_path / "out", "--embeddings", f"{s3.bucket}/absent")
    assert outcome.code == 2
    assert f"{s3.bucket}/absent does not exist" in outcome.errors


def test_nights_in_a_bucket_keep_their_history_there(
    s3: Server, table: str, run_job: Callable[..., Any], tmp_path: Path
) -> None:
    place = f"{s3.bucket}/nightly"
    given = ["--catalogue", table, *EXTRACTOR, "--history", f"{place}/history.parquet", "--runs", f"{place}/runs"]
    for number in ("1", "2", "2"):
        outcome = run_job("scheduled-evaluation", *given, "--run-id", number, "--scratch", tmp_path / f"on {number}")
        assert outcome.code == 0, outcome.errors
    history = pd.read_parquet(fetch(f"{place}/history.parquet", tmp_path / "history.parquet"))
    assert history["run_id"].tolist() == ["1", "2"]
    assert "no regression" in history["reason"][1], "the previous run was fetched and compared with"
    assert b"<svg" in object_store.read(f"{place}/history.html")
    assert json.loads(object_store.read(f"{place}/runs/2/verdict.json"))["previous_run_id"] == "1"


@pytest.mark.parametrize("flag", ["--out", "--runs"])
def test_relative_output_of_a_submitted_job_is_refused_with_the_reason(
    flag: str, catalogue_path: Path, run_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}')
    monkeypatch.chdir(tmp_path)
    given = ["--catalogue", catalogue_path, *EXTRACTOR, flag, "results"]
    other = ["--history", tmp_path / "history.parquet"] if flag == "--runs" else []
    outcome = run_job("scheduled-evaluation" if other else "embed", *given, *other)
    assert outcome.code == 2
    assert f"{flag} results is relative: a submitted job runs in a scratch copy" in outcome.errors
    assert not list(tmp_path.iterdir())


def test_store_that_is_out_ends_with_75(
    s3: Server, table: str, run_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(object_store._RETRIES, "max_retries", 1)
    object_store._store.cache_clear()
    s3.faults(status=503, times=100_000, only=".png")
    given = ["--catalogue", table, "--scratch", tmp_path, "--out", f"{s3.bucket}/embeddings", *EXTRACTOR]
    outcome = run_job("embed", *given)
    object_store._store.cache_clear()
    assert (outcome.code, outcome.errors.count("outage: ")) == (75, 1)
    s3.faults()
    assert run_job("embed", *given).code == 0, "the same command later"


def path_fields(kind: type) -> set[str]:
    """The names of a config's fields that hold a path, those of configs inside too."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= path_fields(hint)
        elif Path in (hint, *typing.get_args(hint)):
            found.add(name)
    return found


@pytest.mark.parametrize("job", JOBS)
def test_every_field_with_a_path_may_be_a_uri_or_is_known_to_be_local(job: str) -> None:
    known = {*storage.INPUTS, *storage.FOLDERS, *storage.FILES, "runs", "history"}
    assert path_fields(JOBS[job]) - known <= {
        "scratch", "metrics_file", "folder", "results", "cache", "token_file", "profile"
    }  # fmt: skip


def test_evaluations_in_a_bucket_are_not_compared_and_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"s3:/bucket/a does not exist; .* on this machine"):
        command_line.run(["compare", "s3://bucket/a", "s3://bucket/b", "--out", str(tmp_path / "out")])


def test_traces_are_not_written_to_a_bucket() -> None:
    with pytest.raises(BadInput, match=r"--profile s3:/bucket/traces: traces are written on this machine only"):
        ObserveConfig(profile=Path("s3://bucket/traces"))


def test_table_of_a_folder_is_not_written_to_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--out s3://bucket/df.csv: this job writes on this machine only; give a path"):
        command_line.run(["catalogue", str(tmp_path), "--out", "s3://bucket/df.csv"])


def test_uri_is_known_in_a_path_and_plain_paths_are_none() -> None:
    assert uri_of(Path("s3://bucket/a b/c")) == "s3://bucket/a b/c"
    assert uri_of("gs://bucket/x") == "gs://bucket/x"
    assert uri_of(Path("file:///tmp/x")) == "file:///tmp/x"
    assert [uri_of(value) for value in ("a/b", Path("/s3:/x"), "hf-hub:owner/name", None, 3)] == [None] * 5
