"""A teacher's logits: the right ones, for the right pairs, and a student that follows them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from training_examples import BACKBONE, SMALL, TOKENS, build_task, draw_catalogue

from distributed_rerank.chain.chain import Chain, PairwiseStep, write_chain
from distributed_rerank.config.pairwise import DistanceSiameseConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.saving import save_model
from distributed_rerank.tensors.pair_values import PairValues
from distributed_rerank.training.distillation import Teacher, check_teachable, read_teacher, score_by_teacher
from distributed_rerank.training.run import fit
from distributed_rerank.training.stage import train
from distributed_rerank.training.task import TrainingTask, plan_epoch

RANDOM = DistanceSiameseConfig(extractor=BACKBONE, identity_init=False, head_seed=7)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    """Validated on the labels it is trained on: the question is whether the student follows its teacher."""
    found = build_task(tmp_path_factory.mktemp("task"), TOKENS, epochs=6, steps_per_epoch=12, lr=2e-2)
    run = found.runs[0]
    return replace(found, runs=(replace(run, validation=run.anchors),))


@pytest.fixture(scope="module")
def taught(task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> PairValues:
    folder = tmp_path_factory.mktemp("teacher")
    teacher, lists = Teacher(DistanceSiamese(RANDOM)), task.runs[0].anchors
    return score_by_teacher(teacher, task.catalogue, lists, folder / "l", WorkConfig(), None)


def test_all_pairs_of_the_lists_are_scored_and_every_planned_step_has_its_part(
    task: TrainingTask, taught: PairValues
) -> None:
    assert len(taught.keys) == (task.runs[0].anchors.items >= 0).sum()
    steps = plan_epoch(replace(task, teacher=taught), task.runs[0], 0)
    for step in steps:
        logits = step.columns()["teacher_logits"]
        assert logits[step.is_negative].isfinite().all()
        assert torch.equal(step.take(3, 8).columns()["teacher_logits"].isnan(), logits[3:8].isnan())


def test_student_follows_a_teacher_that_contradicts_the_labels(
    task: TrainingTask, taught: PairValues, tmp_path: Path
) -> None:
    contrary = replace(taught, values=-2 * (taught.values - taught.values.mean()) / taught.values.std())
    lists = task.runs[0].anchors
    place = torch.searchsorted(taught.keys, lists.query_items[:, None] * taught.n_items + lists.items)
    wanted = contrary.values[place]
    agreement = {}
    for share in (0.0, 1.0):
        config = replace(task.config, teacher_share=share)
        state = fit(replace(task, config=config, teacher=contrary), tmp_path / str(share))
        agreement[share] = order_agreement(state["current"]["best"]["logits"], wanted)
    assert agreement[0.0] < 0.3
    assert agreement[1.0] > 0.7


def order_agreement(logits: Tensor, wanted: Tensor) -> float:
    """Share of the candidate pairs of a list that both order alike."""
    own, other = ((x[:, :, None] < x[:, None, :]) for x in (logits, wanted))
    upper = torch.triu(torch.ones(logits.shape[1], logits.shape[1], dtype=torch.bool), 1)
    return float((own == other)[:, upper].float().mean())


def test_teacher_fuses_as_its_chain_does(tmp_path: Path) -> None:
    save_model(DistanceSiamese(RANDOM), tmp_path)
    assert read_teacher(tmp_path).fusion is None
    write_chain(Chain((PairwiseStep(10, "fuse", 2.0, 0.5),)), tmp_path)
    teacher = read_teacher(tmp_path)
    logits, distances = np.array([1.0, -1.0], np.float32), np.array([0.25, 3.0], np.float32)
    # weight * distance + logit / temperature, times the temperature
    assert teacher.fuse(logits, distances).tolist() == [1.25, 2.0]


def test_stage_with_a_teacher_says_so_in_its_fingerprint(tmp_path: Path) -> None:
    catalogue = draw_catalogue(tmp_path / "images")
    config = replace(SMALL, epochs=1)
    teacher = Teacher(DistanceSiamese(RANDOM))
    train(catalogue, TOKENS, config, tmp_path / "model", teacher=teacher)
    manifest: dict[str, Any] = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["fingerprint"]["teacher"] == teacher.fingerprint()
    with pytest.raises(BadInput, match="teacher"):
        train(catalogue, TOKENS, config, tmp_path / "model")


@pytest.mark.parametrize("changes", [{"loss": "bce"}, {"mining": "whole_batch"}])
def test_teacher_without_lists_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="leave --teacher out"):
        check_teachable(replace(SMALL, **changes), Teacher(DistanceSiamese(RANDOM)))


def test_table_of_scores_teaches_as_its_model_would(task: TrainingTask, taught: PairValues, tmp_path: Path) -> None:
    """The teacher's logits, written as a table of another system's distances and read again."""
    ids, n_items = task.catalogue.ids, len(task.catalogue)
    order = torch.randperm(len(taught.keys), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        (ids[int(key) // n_items], ids[int(key) % n_items], float(logit))
        for key, logit in zip(taught.keys, taught.values, strict=True)
    ]
    table = pd.DataFrame([rows[place] for place in order], columns=["query_id", "gallery_id", "distance"])
    table.to_csv(tmp_path / "vlm.csv", index=False)
    teacher = read_teacher(tmp_path / "vlm.csv")
    found = score_by_teacher(teacher, task.catalogue, task.runs[0].anchors, tmp_path / "l", WorkConfig(), None)
    assert torch.equal(found.keys, taught.keys)
    assert torch.equal(found.values, taught.values)
    before = teacher.fingerprint()
    table.assign(query_id=ids[0], gallery_id=ids[0]).head(1).to_csv(tmp_path / "vlm.csv", index=False)
    assert teacher.fingerprint() != before
    with pytest.raises(BadInput, match="scores none of the"):
        score_by_teacher(teacher, task.catalogue, task.runs[0].anchors, tmp_path / "l", WorkConfig(), None)
