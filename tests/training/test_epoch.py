"""Training in one process: it learns, it repeats, it resumes, it freezes, and its losses are what they
say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from training_examples import BACKBONE, SMALL, TOKENS, build_task, draw_catalogue

from distributed_rerank.chain.chain import read_chain
from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.config.training import TrainingConfig, defaults_for
from distributed_rerank.data.transforms import Augmentation
from distributed_rerank.errors import BadInput
from distributed_rerank.models.saving import load_model
from distributed_rerank.tensors.hardware import bf16_support
from distributed_rerank.training import checkpoints
from distributed_rerank.training.epoch import Worker
from distributed_rerank.training.images import DecodedImages
from distributed_rerank.training.losses import step_loss
from distributed_rerank.training.plan import Step, share_of
from distributed_rerank.training.run import fit, is_over, results, train_all
from distributed_rerank.training.stage import train
from distributed_rerank.training.state import schedule_factor
from distributed_rerank.training.task import TrainingTask

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
        checkpoints.save_epoch(state, tmp_path / "checkpoints", len(seen))
        if len(seen) == n_epochs:
            raise KilledError

    with pytest.raises(KilledError):
        train_all(task, tmp_path, Worker(), None, report)
    assert is_equal(fit(task, tmp_path), trained)


def test_checkpoint_of_another_plan_is_refused(task: TrainingTask, tmp_path: Path) -> None:
    fit(replace(task, config=replace(task.config, epochs=1), runs=task.runs[:1]), tmp_path)
    other = replace(task, config=replace(task.config, seed=1), runs=task.runs[:1])
    with pytest.raises(BadInput, match="other pairs"):
        fit(other, tmp_path)


def test_head_never_sees_encodings_fitted_to_the_labels_it_is_judged_on(
    task: TrainingTask, trained: dict[str, Any], tmp_path: Path
) -> None:
    assert task.half is not None
    fit(replace(task, runs=task.runs[:1]), tmp_path)
    encoders = [load_model(tmp_path / "encodings" / f"encoder-{half}") for half in (0, 1)]
    blocks = sorted((tmp_path / "encodings" / "encodings" / "view-00").iterdir())
    encoded = torch.cat([torch.load(block, weights_only=True) for block in blocks])
    features = [
        torch.load(block, weights_only=True)
        for block in sorted((tmp_path / "encodings" / "features" / "view-00").iterdir())
    ]
    for item, half in enumerate(task.half.tolist()):
        expected: Any = encoders[1 - half]
        own: Any = encoders[half]
        row = torch.cat(features)[item : item + 1]
        torch.testing.assert_close(encoded[item : item + 1], expected.encode_features(row), atol=2e-3, rtol=0)
        assert not torch.allclose(encoded[item : item + 1], own.encode_features(row), atol=2e-2)


def test_frozen_backbone_keeps_its_weights_and_buffers_and_trained_one_does_not(tmp_path: Path) -> None:
    for backbone_lr in (0.0, 1e-2):
        task = build_task(tmp_path / str(backbone_lr), CONCAT, **(FROM_IMAGES | {"backbone_lr": backbone_lr}))
        state = fit(task, tmp_path / f"run-{backbone_lr}")["current"]
        before = load_model(task.model_folder).state_dict()
        changed = {name for name, value in state["model"].items() if not torch.equal(value, before[name])}
        assert any(name.startswith("head.") for name in changed)
        assert any(name.startswith("extractor.") for name in changed) == (backbone_lr > 0)
        assert not any("running" in name for name in changed), "batch normalisation moved"


def test_fitted_projections_are_those_of_the_trained_labels_when_the_backbone_learns_as_well(tmp_path: Path) -> None:
    task = build_task(tmp_path / "task", TOKENS, backbone_lr=1e-3, epochs=2, augmentation=None)
    assert [run.name for run in task.runs] == ["train"], "nothing is halved where encodings change"
    state = fit(task, tmp_path / "run")["current"]
    untrained = load_model(task.model_folder)
    anchors = torch.from_numpy(task.runs[0].anchors.query_items)
    pixels = DecodedImages(task.catalogue, untrained.transform, task.config).plain(anchors)
    expected: Any = load_model(task.model_folder)
    with torch.no_grad():
        expected.fit_encoder(expected.local_features(pixels), torch.from_numpy(task.catalogue.labels)[anchors])
    name = "token_projections.1.matrix"
    torch.testing.assert_close(state["model"][name], expected.state_dict()[name], atol=1e-2, rtol=1e-2)
    assert state["history"][-1]["loss"] < state["history"][0]["loss"]
    assert any(
        not torch.equal(value, untrained.state_dict()[key])
        for key, value in state["model"].items()
        if key.startswith("extractor.")
    )


def test_freeze_epochs_freeze_and_then_let_go(tmp_path: Path) -> None:
    task = build_task(tmp_path, CONCAT, **FROM_IMAGES, freeze_epochs=1)
    states: list[dict[str, Any]] = []
    train_all(task, tmp_path, Worker(), None, lambda state, figures: states.append(state["current"]))
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


@pytest.mark.parametrize("loss", ["bce", "listwise", "ranknet", "margin"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_step_loss_summed_over_shares_is_its_definition(loss: str, world_size: int) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1, -0.4, 1.5])
    is_negative = torch.tensor([False, True, True, False, True, False, True])
    lists = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    step = Step(torch.arange(7), torch.arange(7) + 10, is_negative, lists, torch.ones(7))
    config = TrainingConfig(loss=loss, margin=0.8)  # pyright: ignore[reportArgumentType]
    total, start = 0.0, 0
    for rank in range(world_size):
        share = share_of(step, rank, world_size, loss != "bce")
        if len(share):
            total += float(step_loss(share, logits[start : start + len(share)], config, step.n_units(loss)))
        start += len(share)
    assert total == pytest.approx(float(literal_loss(logits, is_negative, lists, loss)), abs=1e-6)


def literal_loss(logits: Tensor, is_negative: Tensor, lists: Tensor, loss: str) -> Tensor:
    """The definitions, pair by pair and list by list."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(logits, is_negative.float())
    values = []
    for number in lists.unique():
        positive, negative = logits[(lists == number) & ~is_negative], logits[(lists == number) & is_negative]
        if loss == "listwise":
            values.append(functional.cross_entropy(-torch.cat([positive, negative])[None], torch.tensor([0])))
        elif loss == "margin":
            values.append((0.8 + positive[:, None] - negative).clamp(min=0).mean())
        else:
            values.append(torch.log1p(torch.exp(positive[:, None] - negative)).mean())
    return torch.stack(values).mean()


def test_schedule_rises_to_one_and_falls_to_zero() -> None:
    config = TrainingConfig(warmup_steps=4)
    factors = [schedule_factor(step, 20, config) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[20] == pytest.approx(0)
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_training_ends_when_the_figure_no_longer_rises() -> None:
    history = [{"figure": value, "seconds": 1.0} for value in (0.1, 0.3, 0.2, 0.25)]
    config = TrainingConfig(epochs=10, patience=2)
    assert [is_over(history[:n], config) for n in range(5)] == [False, False, False, False, True]
    assert is_over(history, TrainingConfig(epochs=10, patience=0, minutes=4 / 60))
    assert not is_over(history, TrainingConfig(epochs=10, patience=0))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"set_aside": 1.0}, "set_aside=1.0"),
        ({"top_n": 60, "n_items": 50}, "top_n=60 exceeds the 50"),
        ({"mining": "batch", "loss": "listwise"}, "listwise"),
        ({"views": 2, "augmentation": None}, "views=2"),
    ],
)
def test_config_with_a_wrong_value_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        TrainingConfig(**changes)


def test_defaults_of_models_that_learn_from_images_train_their_backbone() -> None:
    assert defaults_for("token") == TrainingConfig()
    assert defaults_for("concat").backbone_lr > 0


def test_stage_writes_a_complete_folder_and_skips_it_the_second_time(tmp_path: Path) -> None:
    catalogue = draw_catalogue(tmp_path / "images")
    config = replace(SMALL, epochs=1)
    chain = train(catalogue, TOKENS, config, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    expected = (
        "README.md chain.json config.json curves.svg manifest.json mining.json model.safetensors suspects.parquet "
        "tensorboard training.json"
    )
    assert names == set(expected.split())
    assert read_chain(tmp_path / "model") == chain
    assert load_model(tmp_path / "model").encoding_shape
    card = (tmp_path / "model" / "README.md").read_text()
    assert "table.csv: 40 images, 10 labels" in card
    assert f"| first stage | {chain.chosen_on['first_stage']['map@10']:.4f} |" in card
    assert f"Chain: {chain.describe()}" in card
    assert "epochs=1" in card
    assert str(tmp_path) not in card, "a shared card tells nobody's folders"

    def refuse(task: TrainingTask, folder: Path) -> dict[str, Any]:
        raise AssertionError("trained again")

    assert train(catalogue, TOKENS, config, tmp_path / "model", fit=refuse) == chain
    with pytest.raises(BadInput, match="lr"):
        train(catalogue, TOKENS, replace(config, lr=0.5), tmp_path / "model")


def test_stage_refuses_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    catalogue = draw_catalogue(tmp_path / "images")
    with pytest.raises(BadInput, match="pip install wandb"):
        train(catalogue, TOKENS, SMALL, tmp_path / "model", services=["wandb"])
