"""jobs/embed.py: what it writes, adds to and leaves alone."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from job_files import EXTRACTOR
from PIL import Image

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.models.adapter import Adapter, save_adapter
from distributed_rerank.models.extractor import build_extractor


def test_embeddings_equal_the_extractor_on_each_image(catalogue_path: Path, run_job: Callable, tmp_path: Path) -> None:
    outcome = run_job(
        "embed", "--catalogue", catalogue_path, "--out", tmp_path / "e", *EXTRACTOR, "--split", "validation",
        "--extractor-precision", "fp32",
    )  # fmt: skip
    assert outcome.code == 0, outcome.errors
    frame = pd.read_parquet(tmp_path / "e" / "embeddings.parquet")
    assert len(frame) == 48
    assert frame["id"].is_monotonic_increasing
    extractor = build_extractor(
        ExtractorConfig(name="test_resnet", weights="none", image_size=32, resize="square", precision="fp32")
    )
    for row in (0, 17, 47):
        image = Image.open(catalogue_path.parent / frame["id"][row]).convert("RGB")
        with torch.inference_mode():
            expected = extractor(extractor.transform(image)[None])[0].numpy()
        np.testing.assert_allclose(frame["embedding"][row], expected, atol=1e-5)
        assert abs(np.linalg.norm(frame["embedding"][row]) - 1) < 1e-5


def test_adapt_writes_the_vectors_that_the_chain_searches_over(
    catalogue_path: Path, run_job: Callable, tmp_path: Path
) -> None:
    common = ["embed", "--catalogue", catalogue_path, "--out", tmp_path / "e", *EXTRACTOR, "--split", "validation"]
    refused = run_job(*common, "--adapt", tmp_path)
    assert refused.code == 2
    assert "--adapt" in refused.errors
    plain = run_job(*common)
    assert plain.code == 0, plain.errors
    frame = pd.read_parquet(tmp_path / "e" / "embeddings.parquet")
    own = np.stack(frame["embedding"].to_numpy())
    matrix = torch.randn(own.shape[1], own.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    save_adapter(Adapter(torch.full((own.shape[1],), 0.1, dtype=torch.float64), matrix), tmp_path)
    outcome = run_job(*common, "--adapt", tmp_path)
    assert outcome.code == 0, outcome.errors
    adapted = pd.read_parquet(tmp_path / "e" / "adapted.parquet")
    assert adapted["id"].tolist() == frame["id"].tolist()
    unit = own.astype(np.float64) / np.linalg.norm(own.astype(np.float64), axis=1, keepdims=True)
    expected = (unit - 0.1) @ matrix.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack(adapted["embedding"].to_numpy()), expected, atol=1e-6)


def test_second_run_computes_only_what_is_missing(catalogue_path: Path, run_job: Callable, tmp_path: Path) -> None:
    common = ["--out", tmp_path / "e", *EXTRACTOR, "--images-per-block", 5]
    run_job("embed", "--catalogue", catalogue_path, *common, "--split", "validation")
    before = pd.read_parquet(tmp_path / "e" / "embeddings.parquet").set_index("id")["embedding"]
    photos = shutil.copytree(catalogue_path.parent, tmp_path / "photos")
    for path in photos.glob("0*.png"):
        path.unlink()  # they are embedded already: their files are not needed
    outcome = run_job("embed", "--catalogue", photos / "df.csv", *common)
    assert outcome.code == 0, outcome.errors
    after = pd.read_parquet(tmp_path / "e" / "embeddings.parquet").set_index("id")["embedding"]
    assert len(after) == 88
    assert all(np.array_equal(after[id], before[id]) for id in before.index)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["blocks"]["computed"]) == (88, 2 * 8)  # embeddings and rejects of 40 images


def test_the_log_counts_the_images_of_this_table(
    catalogue_path: Path, run_job: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder keeps what earlier tables had: it is told apart, and a photo that left the table is no reject of it."""
    photos = shutil.copytree(catalogue_path.parent, tmp_path / "photos")
    table = pd.read_csv(photos / "df.csv", dtype=str)
    table = table[table["split"] == "validation"]
    (photos / table["path"].iloc[3]).write_bytes(b"no photo")
    for n_dropped, said in (
        (0, "47 images embedded, 1 rejected: "),
        (4, "44 images embedded, 0 rejected, beside 3 of"),
    ):
        table.iloc[n_dropped:].to_csv(photos / "df.csv", index=False)
        with caplog.at_level(logging.INFO):
            outcome = run_job("embed", "--catalogue", photos / "df.csv", "--out", tmp_path / "e", *EXTRACTOR)
        assert outcome.code == 0, outcome.errors
        assert said in caplog.text
    assert pd.read_parquet(tmp_path / "e" / "rejects.parquet")["id"].tolist() == [table["path"].iloc[3]]
