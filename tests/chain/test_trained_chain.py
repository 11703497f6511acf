"""What a trained model's chain does to photos that it has not seen: real runs of training and evaluation.

Where re-ranking cannot help the chain must not harm: never more than 0.3 points below the first stage.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from training_examples import BACKBONE, SMALL, TOKENS

from distributed_rerank.chain.chain import Chain, read_chain
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.models.saving import load_model
from distributed_rerank.training.stage import train

N_LABELS, N_IMAGES = 30, 6
CONFIG = replace(SMALL, epochs=4, lists_per_step=16, n_negatives=8, n_items=40, top_n=30, lr=2e-3)
TOLERANCE = 0.003


def write_photos(folder: Path, noise: float, seed: int = 0) -> Path:
    """Random mosaics, one per label, each photo with noise and a colour cast of its own; two splits of labels."""
    folder.mkdir(parents=True)
    state = np.random.default_rng(seed)
    labels = np.repeat(np.arange(N_LABELS), N_IMAGES)
    mosaics = state.uniform(90, 165, (N_LABELS, 5, 5, 3))
    for number, label in enumerate(labels):
        pixels = np.kron(mosaics[label], np.ones((8, 8, 1))) + noise * state.standard_normal((40, 40, 3))
        pixels += 2 * noise * state.standard_normal(3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
    table = pd.DataFrame({"label": labels, "path": [f"{number:03d}.png" for number in range(len(labels))]})
    is_seen = labels >= 20
    table = table.assign(split=np.where(is_seen, "validation", "train"), is_query=is_seen, is_gallery=is_seen)
    table.to_csv(folder / "df.csv", index=False)
    return folder / "df.csv"


def shuffle_labels(table: Path, splits: tuple[str, ...], seed: int) -> Path:
    """The same photos with the labels within these splits drawn anew, in a table beside the given one."""
    content, state = pd.read_csv(table), np.random.default_rng(seed)
    for split in splits:
        rows = (content["split"] == split).to_numpy()
        content.loc[rows, "label"] = state.permutation(content.loc[rows, "label"].to_numpy())
    path = table.with_name(f"{'-'.join(splits)}.csv")
    content.to_csv(path, index=False)
    return path


def trained(table: Path, folder: Path, seed: int) -> Chain:
    """Trains a model into `folder`; returns the chain that it chose."""
    config = replace(CONFIG, seed=seed)
    return train(read_catalogue(str(table), purpose="training"), TOKENS, config, folder)


def figures(table: Path, model: Path, chain: Chain) -> tuple[dict[str, Any], dict[str, Any]]:
    """First stage and chain on the validation photos."""
    validation = read_catalogue(str(table), purpose="evaluation").restrict("validation")
    config = FirstStageConfig(extractor=BACKBONE)
    out = model.with_name(f"evaluation-{table.stem}")
    metrics = evaluate(validation, config, out, model=load_model(model), chain=chain)
    return metrics["first_stage"], metrics["reranked"]


@pytest.mark.parametrize("seed", [0, 1])
def test_chain_trained_on_shuffled_labels_does_no_harm(tmp_path: Path, seed: int) -> None:
    table = write_photos(tmp_path / "photos", noise=3, seed=seed)
    tables = [shuffle_labels(table, splits, seed) for splits in (("train",), ("train", "validation"))]
    chain = trained(tables[0], tmp_path / "model", seed)
    for shuffled in tables:
        before, after = figures(shuffled, tmp_path / "model", chain)
        for key in ("map@10", "cmc@1"):
            assert after[key] >= before[key] - TOLERANCE


def test_chain_of_a_perfect_first_stage_leaves_it_perfect(tmp_path: Path) -> None:
    table = write_photos(tmp_path / "photos", noise=0.2)
    chain = trained(table, tmp_path / "model", 0)
    before, after = figures(table, tmp_path / "model", chain)
    assert before["map@10"] == 1
    assert chain.steps == ()
    assert after["map@10"] >= 1 - TOLERANCE


def test_chain_of_photos_that_re_ranking_tells_apart_has_its_gain(tmp_path: Path) -> None:
    table = write_photos(tmp_path / "photos", noise=3)
    chain = trained(table, tmp_path / "model", 0)
    before, after = figures(table, tmp_path / "model", chain)
    assert chain.pairwise is not None
    assert after["map@10"] > before["map@10"] + 0.05
    assert 0 <= chain.calibration["ece"] < chain.calibration["ece_raw"]


def test_evaluation_says_what_training_promised_for_its_queries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    table = write_photos(tmp_path / "photos", noise=3)
    trained(table, tmp_path / "model", 0)
    assert "promise of the labels set aside: the chain adds to the first stage mAP@10 +0." in caplog.text
    assert "So the chain adds to the first stage mAP@10 +0." in (tmp_path / "model" / "README.md").read_text()
    figures(table, tmp_path / "model", read_chain(tmp_path / "model"))
    folder = tmp_path / "evaluation-df"
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics["promise"]["map@10"]
    assert found["shown"] == metrics["difference"]["map@10"]["mean"]
    assert found["promised"] > 0.05
    assert found["outcome"] in ("kept", "more")  # the model that is kept has learnt from twice the labels
    assert "The labels set aside in training promised mAP@10 +0." in (folder / "report.html").read_text()
