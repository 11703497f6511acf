"""Projections are fitted to the right labels: those of the other half, or those that are trained on."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_examples import TOKENS, build_task

from distributed_rerank.errors import BadInput
from distributed_rerank.models.saving import load_model
from distributed_rerank.training.images import DecodedImages
from distributed_rerank.training.run import fit


def test_head_never_sees_encodings_fitted_to_their_own_labels(tmp_path: Path) -> None:
    task = build_task(tmp_path / "task", TOKENS, epochs=1)
    assert task.half is not None
    fit(replace(task, runs=task.runs[:1]), tmp_path)
    encoders = [load_model(tmp_path / "encodings" / f"encoder-{half}") for half in (0, 1)]
    blocks = sorted((tmp_path / "encodings" / "encodings" / "view-00").glob("*.pt"))
    encoded = torch.cat([torch.load(block, weights_only=True) for block in blocks])
    features = [
        torch.load(block, weights_only=True)
        for block in sorted((tmp_path / "encodings" / "features" / "view-00").glob("*.pt"))
    ]
    for item, half in enumerate(task.half.tolist()):
        expected: Any = encoders[1 - half]
        own: Any = encoders[half]
        row = torch.cat(features)[item : item + 1]
        torch.testing.assert_close(encoded[item : item + 1], expected.encode_features(row), atol=2e-3, rtol=0)
        assert not torch.allclose(encoded[item : item + 1], own.encode_features(row), atol=2e-2)


def test_fitted_projections_are_those_of_the_trained_labels_when_the_backbone_learns_as_well(tmp_path: Path) -> None:
    task = build_task(tmp_path / "task", TOKENS, backbone_lr=1e-3, epochs=2, augmentation=None)
    assert [run.name for run in task.runs] == ["train"], "nothing is halved where encodings change"
    state = fit(task, tmp_path / "run")["current"]
    untrained = load_model(task.model_folder)
    anchors = task.runs[0].anchors.query_items
    pixels = DecodedImages(task.catalogue, untrained.transform, task.config).plain(anchors)
    expected: Any = load_model(task.model_folder)
    with torch.no_grad():
        labels = torch.tensor(task.catalogue.labels).long()[anchors]
        expected.fit_encoder(expected.local_features(pixels), labels)
    name = "token_projections.1.matrix"
    torch.testing.assert_close(state["model"][name], expected.state_dict()[name], atol=1e-2, rtol=1e-2)
    assert state["history"][-1]["loss"] < state["history"][0]["loss"]
    assert any(
        not torch.equal(value, untrained.state_dict()[key])
        for key, value in state["model"].items()
        if key.startswith("extractor.")
    )


def test_image_that_is_gone_since_it_was_embedded_is_named(tmp_path: Path) -> None:
    task = build_task(tmp_path)
    ref = task.catalogue.images()[3]
    Path(ref.path).unlink()
    with pytest.raises(BadInput, match=rf"image '{re.escape(ref.id)}' .*could be read before and cannot now: file not"):
        fit(task, tmp_path / "run")
