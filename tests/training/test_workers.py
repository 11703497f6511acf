"""Any number of workers with the same global batch: the losses of one worker, step by step."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_workers import train_together
from training_examples import BACKBONE, TOKENS, build_task

from distributed_rerank.config.pairwise import ConcatSiameseConfig, DistanceSiameseConfig
from distributed_rerank.data import begun
from distributed_rerank.errors import BadInput
from distributed_rerank.models import precision
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.training.epoch import Worker
from distributed_rerank.training.run import note_device
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


@pytest.mark.parametrize("kinds", [(None, "AVX-512 BF16"), ("AVX-512 BF16", "AVX-512 BF16")])
def test_workers_of_two_kinds_are_all_refused_so_that_none_waits_for_the_others(
    kinds: tuple[str | None, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DistanceSiamese(DistanceSiameseConfig(extractor=replace(BACKBONE, precision="auto")))
    barrier, own, parts = threading.Barrier(2, timeout=60), threading.local(), {}
    monkeypatch.setattr(precision, "bf16_support", lambda device: own.kind)

    def note(rank: int) -> str:
        own.kind = kinds[rank]

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            parts[rank] = tensor
            barrier.wait()
            return parts[0] + parts[1]

        try:
            note_device(model, tmp_path / "run", Worker(rank, 2, "cpu", all_reduce))
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
