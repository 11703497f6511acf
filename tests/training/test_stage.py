"""The stage: a complete model folder, which the same call leaves alone and another one refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_examples import BACKBONE, SMALL, TOKENS, draw_catalogue

from distributed_rerank.chain.chain import read_chain
from distributed_rerank.data import tables
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import embed
from distributed_rerank.models.saving import load_model
from distributed_rerank.training.run import fit
from distributed_rerank.training.stage import train
from distributed_rerank.training.task import TrainingTask


def test_stage_writes_a_complete_folder_and_skips_it_the_second_time(tmp_path: Path) -> None:
    catalogue = draw_catalogue(tmp_path / "images")
    config = replace(SMALL, epochs=1)
    chain = train(catalogue, TOKENS, config, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    expected = (
        "README.md chain.json config.json curves.svg manifest.json mining.json model.safetensors suspects.parquet "
        "tensorboard trained_on.json training.json"
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


def test_image_that_has_vanished_is_a_reject_and_the_model_is_that_of_a_table_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a training was begun with it: encodings of other items are not taken for those of these."""
    whole = draw_catalogue(tmp_path / "images")
    config = replace(SMALL, epochs=2)

    def stops(task: TrainingTask, folder: Path) -> dict[str, Any]:
        fit(task, folder)
        raise KeyboardInterrupt

    embed(whole, BACKBONE, tmp_path / "embeddings")
    with pytest.raises(KeyboardInterrupt):
        train(whole, TOKENS, config, tmp_path / "model", fit=stops, embeddings_folder=tmp_path / "embeddings")
    gone = whole.images()[5]
    Path(gone.path).unlink()
    train(whole, TOKENS, config, tmp_path / "model", embeddings_folder=tmp_path / "embeddings")
    assert f"1 of 40 images (2.50%) cannot be read AND ARE LEFT OUT ({gone.id}: file not found)" in caplog.text
    (row,) = tables.read_table(tmp_path / "model" / "rejects.parquet", "rejects").to_pylist()
    assert row == {"id": gone.id, "path": gone.path, "stage": "train", "reason": "file not found"}

    without = whole.take(np.delete(np.arange(len(whole)), 5))
    train(without, TOKENS, config, tmp_path / "without", embeddings_folder=tmp_path / "embeddings")
    for name in ("model.safetensors", "training.json", "mining.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    for ref in whole.images()[:30]:
        Path(ref.path).unlink(missing_ok=True)
    with pytest.raises(BadInput, match=r"30 of 40 images .* cannot be read, more than max_rejects"):
        train(whole, TOKENS, config, tmp_path / "other", embeddings_folder=tmp_path / "embeddings")


def test_stage_refuses_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    catalogue = draw_catalogue(tmp_path / "images")
    with pytest.raises(BadInput, match="pip install wandb"):
        train(catalogue, TOKENS, SMALL, tmp_path / "model", services=["wandb"])


def test_three_labels_are_trained_on_and_the_chain_stays_the_first_stage(tmp_path: Path) -> None:
    catalogue = draw_catalogue(tmp_path / "images", n_labels=3)
    chain = train(catalogue, TOKENS, replace(SMALL, epochs=1), tmp_path / "model")
    assert chain.steps == ()
    assert "3 train labels" in chain.evidence_text
    assert chain.evidence_text in (tmp_path / "model" / "README.md").read_text()
    assert load_model(tmp_path / "model").encoding_shape
