"""Training in one process: it learns, it repeats, it resumes, and it freezes the layers it was told to freeze."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_examples import BACKBONE, TOKENS, build_task

from distributed_rerank.config.augmentation import Augmentation
from distributed_rerank.config.pairwise import ConcatSiameseConfig, DistanceSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models import precision as precision_module
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.saving import load_model
from distributed_rerank.runtime.devices import pick_device
from distributed_rerank.storage import begun
from distributed_rerank.tensors.hardware import bf16_support
from distributed_rerank.training import tracking
from distributed_rerank.training.run import fit, is_over, note_device, results, train_all
from distributed_rerank.training.state import save_epoch
from distributed_rerank.training.task import TrainingTask, TrainingWorker

CONCAT = ConcatSiameseConfig(extractor=BACKBONE, hidden_dims=(16,), dropout=0.5)
FROM_IMAGES: dict[str, Any] = {
    "mining": "batch", "loss": "bce", "n_labels": 3, "n_instances": 2, "epochs": 2, "backbone_lr": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    return build_task(tmp_path_factory.mktemp("token"), replace(TOKENS, head_dropout=0.2))


@pytest.fixture(scope="module")
def trained(task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit(task, tmp_path_factory.mktemp("trained"))


def is_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Same weights, same optimizer, same figures, bit for bit; only the clock may differ."""
    without_clock = [
        [{key: value for key, value in entry.items() if key != "seconds"} for entry in state["current"]["history"]]
        for state in (one, other)
    ]
    weights = [
        [
            *state["current"]["model"].values(),
            *(r["best"]["model"]["head.linear.weight"] for r in state["finished"]),
        ]
        for state in (one, other)
    ]
    moments = [[entry["exp_avg"] for entry in s["current"]["optimizer"]["state"].values()] for s in (one, other)]
    same = [torch.equal(a, b) for a, b in zip(weights[0] + moments[0], weights[1] + moments[1], strict=True)]
    return all(same) and without_clock[0] == without_clock[1]


def test_training_lowers_the_loss_of_every_run(trained: dict[str, Any]) -> None:
    histories = [result["history"] for result in results(trained)]
    assert len(histories) == 3
    for history in histories:
        assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_training_twice_gives_the_same_bits(task: TrainingTask, trained: dict[str, Any], tmp_path: Path) -> None:
    assert is_equal(fit(task, tmp_path), trained)


@pytest.mark.parametrize("n_epochs", [1, 3, 4])
def test_training_stopped_and_resumed_equals_an_uninterrupted_one(
    task: TrainingTask, trained: dict[str, Any], tmp_path: Path, n_epochs: int
) -> None:
    class KilledError(Exception):
        """Stands for the end of the process."""

    seen = []

    def report(state: dict[str, Any], figures: dict[str, float]) -> None:
        seen.append(figures)
        save_epoch(state, tmp_path / "checkpoints", len(seen))
        if len(seen) == n_epochs:
            raise KilledError

    with pytest.raises(KilledError):
        train_all(task, tmp_path, TrainingWorker(device=str(pick_device())), None, report)
    assert is_equal(fit(task, tmp_path), trained)


def test_checkpoint_of_another_plan_is_refused(task: TrainingTask, tmp_path: Path) -> None:
    fit(replace(task, config=replace(task.config, epochs=1), runs=task.runs[:1]), tmp_path)
    other = replace(task, config=replace(task.config, seed=1), runs=task.runs[:1])
    with pytest.raises(BadInput, match="other pairs"):
        fit(other, tmp_path)


def test_frozen_backbone_keeps_its_weights_and_buffers_and_trained_one_does_not(tmp_path: Path) -> None:
    for backbone_lr in (0.0, 1e-2):
        task = build_task(tmp_path / str(backbone_lr), CONCAT, **(FROM_IMAGES | {"backbone_lr": backbone_lr}))
        state = fit(task, tmp_path / f"run-{backbone_lr}")["current"]
        before = load_model(task.model_folder).state_dict()
        changed = {name for name, value in state["model"].items() if not torch.equal(value, before[name])}
        assert any(name.startswith("head.") for name in changed)
        assert any(name.startswith("extractor.") for name in changed) == (backbone_lr > 0)
        assert not any("running" in name for name in changed), "batch normalisation moved"


def test_freeze_epochs_freeze_and_then_let_go(tmp_path: Path) -> None:
    task = build_task(tmp_path, CONCAT, **FROM_IMAGES, freeze_epochs=1)
    states: list[dict[str, Any]] = []
    train_all(task, tmp_path, TrainingWorker(), None, lambda state, figures: states.append(state["current"]))
    before = load_model(task.model_folder).state_dict()
    assert not any(name.startswith("extractor.") for name in states[0]["model"]), "the frozen backbone was copied"
    assert any(
        not torch.equal(value, before[name])
        for name, value in states[1]["model"].items()
        if name.startswith("extractor.")
    )


def test_loader_workers_accumulation_and_gradient_checkpointing_change_no_loss(tmp_path: Path) -> None:
    config = replace(CONCAT, dropout=0.0)
    augmentation = Augmentation(min_scale=0.6)
    one = build_task(tmp_path, config, **FROM_IMAGES, augmentation=augmentation)
    losses = []
    for number, changes in enumerate(
        ({}, {"loader_workers": 2}, {"accumulation": 3}, {"gradient_checkpointing": True})
    ):
        task = replace(one, config=replace(one.config, **changes))
        history = fit(task, tmp_path / str(number))["current"]["history"]
        losses.append([entry["loss"] for entry in history])
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert losses[3] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.skipif(bf16_support(torch.device("cpu")) is None, reason="this CPU multiplies no bf16")
def test_backbone_trained_in_bf16_has_nearly_the_losses_of_fp32_and_float32_weights(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        # Not 32 pixels: torch 2.15's bf16 convolution for AMX reads memory that nobody has written where its output is
        # one column wide and several rows high.
        config = replace(CONCAT, dropout=0.0, extractor=replace(BACKBONE, precision=precision, image_size=64))
        task = build_task(tmp_path / precision, config, **FROM_IMAGES)
        state = fit(task, tmp_path / f"run-{precision}")["current"]
        losses[precision] = [entry["loss"] for entry in state["history"]]
        assert all(v.dtype == torch.float32 for v in state["model"].values() if v.is_floating_point())
    assert losses["bf16"] != losses["fp32"], "nothing was computed in bf16"
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)


def test_training_ends_when_the_figure_no_longer_rises() -> None:
    history = [{"figure": value, "seconds": 1.0} for value in (0.1, 0.3, 0.2, 0.25)]
    config = TrainingConfig(epochs=10, patience=2)
    assert [is_over(history[:n], config) for n in range(5)] == [False, False, False, False, True]
    assert is_over(history, TrainingConfig(epochs=10, patience=0, minutes=4 / 60))
    assert not is_over(history, TrainingConfig(epochs=10, patience=0))


@pytest.mark.parametrize("patience", [5, 0])
def test_extractor_that_training_cannot_better_stays_as_it_was(patience: int, tmp_path: Path) -> None:
    task = build_task(
        tmp_path, DistanceSiameseConfig(extractor=BACKBONE, linear=False), mining="whole_batch", loss="listwise",
        temperature=0.1, n_labels=4, n_instances=3, epochs=2, patience=patience, backbone_lr=1e-2, lr=1e-2,
    )  # fmt: skip
    (result,) = results(fit(task, tmp_path / "run"))
    assert result["history"][0]["first_stage"] == 1.0, "nothing is left to gain"
    start, best = load_model(task.model_folder).state_dict(), result["best"]
    is_same = all(torch.equal(start[name], value) for name, value in best["model"].items())
    assert (is_same, best["epoch"]) == ((True, 0) if patience else (False, 2))


@pytest.mark.parametrize("kinds", [(None, "AVX-512 BF16"), ("AVX-512 BF16", "AVX-512 BF16")])
def test_workers_of_two_kinds_are_all_refused_so_that_none_waits_for_the_others(
    kinds: tuple[str | None, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DistanceSiamese(DistanceSiameseConfig(extractor=replace(BACKBONE, precision="auto")))
    barrier, own, parts = threading.Barrier(2, timeout=60), threading.local(), {}
    monkeypatch.setattr(precision_module, "bf16_support", lambda device: own.kind)

    def note(rank: int) -> str:
        own.kind = kinds[rank]

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            parts[rank] = tensor
            barrier.wait()
            return parts[0] + parts[1]

        try:
            note_device(model, tmp_path / "run", TrainingWorker(rank, 2, "cpu", all_reduce))
        except BadInput as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(note, (0, 1)))
    if kinds[0] == kinds[1]:
        assert errors == ["", ""]
        assert begun.recall(tmp_path / "run")["precision"] == "bfloat16"
    else:
        assert all("some workers compute with precision=" in error for error in errors)
        assert begun.recall(tmp_path / "run") == {}


def test_training_needs_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    task = build_task(tmp_path / "task", epochs=1)
    assert fit(replace(task, runs=task.runs[:1]), tmp_path / "run")["current"]["history"]
    assert not list((tmp_path / "run").rglob("events.*"))
