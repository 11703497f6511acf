"""jobs/scheduled_evaluation.py: exit codes of planted and absent regressions, one row a run, a killed run continued."""

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from job_files import wait_until

EXTRACTOR = ["--extractor", "test_resnet", "--extractor-weights", "none", "--image-size", "32"]
WRITTEN = ("metrics.json", "per_query.parquet", "reranked.parquet", "verdict.json", "trend.svg")


def write_lists(path: Path, catalogue_path: Path, broken_category: str | None = None) -> Path:
    """Candidates of every query, the relevant ones first; in the broken category last."""
    table = pd.read_csv(catalogue_path, dtype=str, keep_default_na=False)
    table = table[table["split"] == "validation"]
    gallery = table[table["is_gallery"] == "True"]
    rows = []
    for _, query in table[table["is_query"] == "True"].iterrows():
        others = gallery[gallery["path"] != query["path"]]
        is_relevant = (others["label"] == query["label"]).to_numpy()
        first = ~is_relevant if query["category"] == broken_category else is_relevant
        ids = others["path"].to_numpy()[np.argsort(~first, kind="stable")]
        rows += [(query["path"], id, place) for place, id in enumerate(ids[:20])]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"]).to_csv(path, index=False)
    return path


def arguments(catalogue_path: Path, folder: Path, run_id: str, *others: object) -> list[object]:
    places = ["--history", folder / "history.parquet", "--runs", folder / "runs", "--run-id", run_id]
    return ["--catalogue", catalogue_path, *places, *others]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.ray
def test_planted_regression_exits_3_and_names_it_the_same_data_exits_0(
    catalogue_path: Path, run_job: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_lists(tmp_path / "good.csv", catalogue_path)
    bad = write_lists(tmp_path / "bad.csv", catalogue_path, broken_category="b")
    caplog.set_level(logging.INFO)

    def run(run_id: str, lists: Path, *others: object) -> int:
        given = arguments(catalogue_path, tmp_path, run_id, "--candidates", lists, *others)
        return run_job("scheduled_evaluation", *given).code

    assert run("2026-11-21", good) == 0
    pinned = ["--baseline", tmp_path / "runs" / "2026-11-21"]
    assert run("2026-11-22", good, *pinned) == 0
    assert run("2026-11-23", bad, *pinned) == 3
    said = caplog.messages[-1]
    verdict = json.loads((tmp_path / "runs" / "2026-11-23" / "verdict.json").read_text())
    difference = verdict["against"]["baseline"]["difference"]["map@10"]
    assert difference["mean"] < -0.02
    low, high = (f"−{-end:.3f}" for end in difference["ci95"])
    assert f"mAP@10 −{-difference['mean']:.3f} (95 % interval {low} to {high}) against the baseline" in said
    assert "worst category: 'b'" in said

    before = files_of(tmp_path)
    assert run("2026-11-23", bad, *pinned) == 3
    assert "run 2026-11-23 was done before: regression" in caplog.messages[-1]
    assert files_of(tmp_path) == before
    assert pd.read_parquet(tmp_path / "history.parquet")["exit_code"].tolist() == [0, 0, 3]
    assert run("2026-11-23", good, *pinned) == 2, "another input under a known id"
    assert files_of(tmp_path) == before


@pytest.mark.ray
def test_baseline_of_a_smaller_catalogue_is_compared_on_the_common_queries(
    catalogue_path: Path, run_job: Callable[..., Any], tmp_path: Path
) -> None:
    table = pd.read_csv(catalogue_path, dtype=str, keep_default_na=False)
    shutil.copytree(catalogue_path.parent, tmp_path / "other")
    table[table["label"] != "0"].to_csv(tmp_path / "other" / "df.csv", index=False)
    lists = write_lists(tmp_path / "lists.csv", tmp_path / "other" / "df.csv")
    other = arguments(tmp_path / "other" / "df.csv", tmp_path, "1", "--candidates", lists)
    assert run_job("scheduled_evaluation", *other).code == 0
    whole = write_lists(tmp_path / "whole.csv", catalogue_path)
    given = arguments(catalogue_path, tmp_path, "2", "--candidates", whole, "--baseline", tmp_path / "runs" / "1")
    outcome = run_job("scheduled_evaluation", *given)
    assert outcome.code == 0, outcome.errors
    verdict = json.loads((tmp_path / "runs" / "2" / "verdict.json").read_text())
    assert "the catalogue changed from" in verdict["reason"]


@pytest.mark.ray
@pytest.mark.slow
def test_killed_run_continues_and_gives_the_same_bytes(
    catalogue_path: Path,
    models: dict[str, Path],
    run_job: Callable[..., Any],
    start_job: Callable[..., subprocess.Popen[str]],
    ray_cluster: str,
    tmp_path: Path,
) -> None:
    model = ["--model", models["concat"], *EXTRACTOR, "--images-per-block", "6", "--queries-per-block", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_job("scheduled_evaluation", *arguments(catalogue_path, whole, "1", *model)).code == 0

    given = arguments(catalogue_path, killed, "1", *model, "--num-workers", "1")
    process = start_job("scheduled_evaluation", *given)
    wait_for_pair_blocks(killed / "runs", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "history.parquet").exists()
    assert not (killed / "runs" / "1").exists()
    assert run_job("scheduled_evaluation", *given).code == 0
    for name in WRITTEN:
        assert (killed / "runs/1" / name).read_bytes() == (whole / "runs/1" / name).read_bytes(), name
    assert (killed / "history.parquet").read_bytes() == (whole / "history.parquet").read_bytes()
    manifest = json.loads((killed / "runs/1/pair_distances/manifest.json").read_text())
    assert manifest["blocks"]["reused"] > 0


def wait_for_pair_blocks(runs: Path, process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Until the first scored block is on disk, while the process still runs."""
    is_there = wait_until(
        lambda: process.poll() is not None or len(list(runs.glob(".*/**/pair_distances/block-*.parquet"))) >= 2, seconds
    )
    assert process.poll() is None, process.communicate()[1]
    assert is_there, f"no pair was scored within {seconds} s"
