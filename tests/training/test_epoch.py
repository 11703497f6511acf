"""Any number of workers with the same global batch: the losses of one worker, step by step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_workers import train_together
from training_examples import BACKBONE, TOKENS, build_task

from distributed_rerank.config.pairwise import ConcatSiameseConfig, DistanceSiameseConfig
from distributed_rerank.training.run import fit
from distributed_rerank.training.task import TrainingTask

N_STEPS = 20
ONE_STEP_AN_EPOCH: dict[str, Any] = {
    "epochs": N_STEPS, "steps_per_epoch": 1, "lists_per_step": 7, "clip_norm": 0.5, "lr": 1e-3
}  # fmt: skip
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "backbone trained on images": (
        ConcatSiameseConfig(extractor=BACKBONE, hidden_dims=(16,), dropout=0.0),
        {"backbone_lr": 1e-4},
    ),
    "head on encodings": (TOKENS, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_two_and_four_workers_have_the_same_losses_for_twenty_steps(name: str, tmp_path: Path) -> None:
    model_config, changes = MODELS[name]
    task: TrainingTask = build_task(tmp_path / "task", model_config, **ONE_STEP_AN_EPOCH, **changes)
    task = replace(task, runs=task.runs[:1])
    losses: dict[int, list[list[float]]] = {}
    for world_size in (1, 2, 4):
        states = train_together(task, tmp_path / str(world_size), world_size)
        losses[world_size] = [[entry["loss"] for entry in state["current"]["history"]] for state in states]
        first, *others = (state["current"]["model"] for state in states)
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first), "workers have drifted apart"
    (alone,) = losses[1]
    assert len(alone) == N_STEPS
    assert len(set(alone)) > N_STEPS / 2, "nothing was learnt, so nothing is compared"
    for world_size in (2, 4):
        assert all(own == losses[world_size][0] for own in losses[world_size])
        assert losses[world_size][0] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("loss", ["listwise", "margin"])
def test_training_with_two_threads_gives_the_same_bits_every_time(loss: str, tmp_path: Path) -> None:
    """Every image is in many pairs: their gradients must be summed in one order."""
    task = build_task(
        tmp_path / "task", DistanceSiameseConfig(extractor=BACKBONE, linear=False), loss=loss, mining="whole_batch",
        n_labels=7, n_instances=4, backbone_lr=1e-2, temperature=0.1, threads=2,
    )  # fmt: skip
    first, *others = (fit(task, tmp_path / str(number))["current"] for number in range(4))
    for other in others:
        assert all(torch.equal(value, other["model"][name]) for name, value in first["model"].items())
