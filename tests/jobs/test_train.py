"""jobs/train.py as a process of its own, on Ray Train; then the model is used by path."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from job_files import EXTRACTOR

SMALL = ["--epochs", "2", "--steps-per-epoch", "3", "--lists-per-step", "8", "--n-negatives", "3", "--n-items", "10",
         "--top-n", "8", "--warmup-steps", "1", "--num-workers", "2"]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_trained_model_is_evaluated_by_its_path(
    catalogue_path: Path, start_job: Callable, run_job: Callable, tmp_path: Path
) -> None:
    command = ["--catalogue", catalogue_path, "--out", tmp_path / "model", *EXTRACTOR, *SMALL]
    process = start_job("train", *command, "--pairwise-model", "distance")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "2 workers" in said
    names = {path.name for path in (tmp_path / "model").iterdir()}
    wanted = {"config.json", "model.safetensors", "chain.json", "training.json", "curves.svg", "manifest.json"}
    assert wanted <= names
    history = json.loads((tmp_path / "model" / "training.json").read_text())["history"]
    assert all(len(entries) == 2 for entries in history.values())
    outcome = run_job(
        "evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "e", *EXTRACTOR, "--model", tmp_path / "model"
    )
    assert outcome.code == 0, outcome.errors
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["n_queries"] == 36
    again = run_job("train", *command, "--pairwise-model", "distance")
    assert again.code == 0, again.errors
    refused = run_job("train", *command, "--pairwise-model", "distance", "--lr", 0.5)
    assert refused.code == 2
    assert "lr" in refused.errors
    assert "--overwrite" in refused.errors
