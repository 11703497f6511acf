"""MLflow and W&B, the real ones: one run a training, opened before the work, continued, ended with its result."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_files import wait_until
from training_examples import SMALL, TOKENS, draw_catalogue

from distributed_rerank.training.run import fit
from distributed_rerank.training.services import flat
from distributed_rerank.training.stage import train
from distributed_rerank.training.task import TrainingTask

CONFIG = replace(SMALL, epochs=2)


def test_settings_are_named_by_their_place() -> None:
    settings = {"config": {"lr": 0.1, "filters": {"range_min": 0}, "none": {}}, "version": 3}
    expected = {"config.lr": "0.1", "config.filters.range_min": "0", "config.none": "{}", "version": "3"}
    assert dict(flat(settings)) == expected


def test_mlflow_has_one_run_of_a_training_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is absent: pip install mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the test")
    catalogue = draw_catalogue(tmp_path / "images")
    client = mlflow.MlflowClient()

    def runs() -> list[Any]:
        experiment = client.get_experiment_by_name("of the test")
        return [] if experiment is None else client.search_runs([experiment.experiment_id])

    def stops(task: TrainingTask, folder: Path) -> dict[str, Any]:
        (found,) = runs()
        assert found.info.status == "RUNNING", "opened before the work"
        assert found.data.params["training.epochs"] == "2"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(catalogue, TOKENS, CONFIG, tmp_path / "model", services=["mlflow"], fit=stops)
    (stopped,) = runs()
    assert stopped.info.status == "KILLED"
    chain = train(catalogue, TOKENS, CONFIG, tmp_path / "model", services=["mlflow"], fit=fit)
    (found,) = runs()
    assert (found.info.run_id, found.info.status) == (stopped.info.run_id, "FINISHED")
    history = json.loads((tmp_path / "model" / "training.json").read_text())["history"]
    for name, entries in history.items():
        logged = client.get_metric_history(found.info.run_id, f"{name}/epoch/loss".replace("@", "_at_"))
        assert [point.value for point in logged] == [entry["loss"] for entry in entries], name
    figures = found.data.metrics
    assert figures["final/chain/map_at_10"] == chain.chosen_on["chosen"]["map@10"]
    gain = figures["final/chain/map_at_10"] - figures["final/first stage/map_at_10"]
    assert figures["final/gain/map_at_10"] == gain
    kept = Path(client.download_artifacts(found.info.run_id, "model"))
    for name in ("model.safetensors", "chain.json", "README.md", "curves.svg"):
        assert (kept / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_wandb_has_the_figures_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what would be sent lies in files of one run."""
    pytest.importorskip("wandb", reason="wandb is absent: pip install wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(draw_catalogue(tmp_path / "images"), TOKENS, CONFIG, tmp_path / "model", services=["wandb"])
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "one run, opened several times"
    for name in (b"training.epochs", b"final/gain/map@10", b"epoch/loss", b"model.safetensors"):
        # W&B's own process may still be writing.
        assert wait_until(lambda name=name: any(name in file.read_bytes() for file in files), 20), name
