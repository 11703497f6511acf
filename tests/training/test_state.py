"""The state of a run: optimizer and schedule; its files are whole or absent, and the newest one is found."""

from pathlib import Path

import pytest
import torch
from training_examples import TOKENS

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import build_model
from distributed_rerank.training.state import (
    build_optimizer,
    freeze_encoder,
    load_latest,
    save_epoch,
    saved_epochs,
    schedule_factor,
)


def test_load_latest_gives_back_what_was_saved_last(tmp_path: Path) -> None:
    for epoch in (1, 2, 10):
        save_epoch({"weights": torch.full((3,), float(epoch)), "history": [{"loss": 0.5}]}, tmp_path, epoch)
    found = load_latest(tmp_path)
    assert found is not None
    assert found["weights"].tolist() == [10.0, 10.0, 10.0]
    assert found["history"] == [{"loss": 0.5}]
    assert saved_epochs(tmp_path) == [2, 10]


def test_load_latest_ignores_an_unfinished_file(tmp_path: Path) -> None:
    save_epoch({"epoch": 1}, tmp_path, 1)
    (tmp_path / ".epoch-00002.pt.77.tmp").write_bytes(b"half of a checkp")
    assert load_latest(tmp_path) == {"epoch": 1}


def test_load_latest_of_an_absent_folder_is_nothing(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


def test_model_without_parameters_is_told_in_one_line() -> None:
    class Empty(PairwiseModel):
        pass

    extractor = build_model(TOKENS).extractor
    for module in list(extractor.modules()):
        module._parameters.clear()
    with pytest.raises(BadInput, match="Empty has no parameters, so there is nothing to train"):
        freeze_encoder(Empty(TOKENS, extractor))


def test_schedule_rises_to_one_and_falls_to_zero() -> None:
    config = TrainingConfig(warmup_steps=4)
    factors = [schedule_factor(step, 20, config) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[20] == pytest.approx(0)
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_sgd_has_the_momentum_of_the_config_and_no_decay_on_vectors() -> None:
    model = build_model(TOKENS)
    optimizer = build_optimizer(
        model, TrainingConfig(optimizer="sgd", momentum=0.5, weight_decay=0.2, backbone_lr=1e-3)
    )
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    for group in optimizer.param_groups:
        assert {p.ndim < 2 for p in group["params"]} == {group["weight_decay"] == 0.0}
