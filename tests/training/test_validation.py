"""Mining again: the lists become the model's own, on every worker alike, and after a stop the same ones."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from thread_workers import train_together
from training_examples import TOKENS, build_task

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.devices import pick_device
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.training.plan import reorder
from distributed_rerank.training.run import fit, train_all
from distributed_rerank.training.state import save_epoch
from distributed_rerank.training.task import TrainingTask, TrainingWorker, plan_epoch


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    """One run of four epochs that mines again before the third."""
    found = build_task(
        tmp_path_factory.mktemp("task"), TOKENS, epochs=4, remine_every=2, n_items=10, top_n=4, n_negatives=3
    )
    return replace(found, runs=found.runs[:1])


@pytest.fixture(scope="module")
def states(task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The state after each epoch of an uninterrupted run."""
    found: list[dict[str, Any]] = []
    folder = tmp_path_factory.mktemp("whole")
    train_all(
        task,
        folder,
        TrainingWorker(device=str(pick_device())),
        None,
        lambda state, figures: found.append(copy.deepcopy(state["current"])),
    )
    return found


def test_negatives_come_from_the_candidates_nearest_by_the_model(
    task: TrainingTask, states: list[dict[str, Any]]
) -> None:
    assert [state["order"] is None for state in states] == [True, True, False, False]
    order = states[2]["order"]
    assert order.shape == (len(task.runs[0].anchors.query_items), 4)
    assert (order >= 4).any(), "the model orders as the first stage does"
    anchors = task.runs[0].anchors
    kept = reorder(anchors, order)
    row_of = {item: row for row, item in enumerate(anchors.query_items.tolist())}
    steps = plan_epoch(task, task.runs[0], 2, order)
    assert steps
    for step in steps:
        chosen = zip(*(c[step.is_negative].tolist() for c in (step.query_items, step.gallery_items)), strict=True)
        assert all(item in kept.items[row_of[query]] for query, item in chosen)


def test_reorder_moves_items_and_distances_together_and_keeps_gaps_at_the_end() -> None:
    lists = CandidateLists(torch.tensor([5]), torch.tensor([[7, 8, 9]]), torch.tensor([[0.1, 0.2, 0.3]]))
    found = reorder(lists, torch.tensor([[2, 0, -1]]))
    assert found.items.tolist() == [[9, 7, -1]]
    assert found.distances.tolist() == [[pytest.approx(0.3), pytest.approx(0.1), np.inf]]


@pytest.mark.parametrize("n_epochs", [2, 3])
def test_stopped_before_and_after_mining_again_gives_the_weights_of_an_uninterrupted_run(
    task: TrainingTask, states: list[dict[str, Any]], tmp_path: Path, n_epochs: int
) -> None:
    save_epoch({"finished": [], "current": states[n_epochs - 1]}, tmp_path / "checkpoints", n_epochs)
    resumed = fit(task, tmp_path)["current"]
    assert resumed["epoch"] == 4
    for name, value in states[3]["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


def test_two_workers_share_the_mining_and_find_the_same(
    task: TrainingTask, states: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, second = (state["current"] for state in train_together(task, tmp_path, 2))
    assert torch.equal(first["order"], second["order"])
    assert [entry["loss"] for entry in first["history"]] == pytest.approx(
        [entry["loss"] for entry in states[3]["history"]], abs=1e-5
    )


def test_mining_again_without_lists_is_refused() -> None:
    with pytest.raises(BadInput, match="remine_every=3"):
        TrainingConfig(remine_every=3, mining="whole_batch")
