"""--log-format json and --profile: the same on the driver and on workers of every kind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_files import EXTRACTOR, SMALL_BLOCKS, bytes_of
from PIL import Image

from distributed_rerank.models.packing import can_pack

CONVOLUTION = "mkldnn::_convolution_pointwise" if can_pack() else "aten::convolution"
EXPECTED = {"embed": CONVOLUTION, "search": "aten::index", "score": CONVOLUTION}
"""An operator of each kind of worker."""


def run(*words: object, into: Path) -> list[dict[str, Any]]:
    """The JSON log lines of a job of its own process; Ray writes the worker's name before its lines."""
    command = [sys.executable, "-m", "distributed_rerank", *map(str, words), "--out", str(into)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[line.index('{"time"') :]) for line in done.stderr.splitlines() if '{"time"' in line]


def traces_of(folder: Path) -> dict[str, set[str]]:
    """The operators in the traces of each kind of worker."""
    found: dict[str, set[str]] = {}
    for path in folder.glob("*.json"):
        events = json.loads(path.read_text())["traceEvents"]
        found.setdefault(path.name.partition("-")[0], set()).update(event.get("name", "") for event in events)
    return found


def watched(folder: Path, n_workers: int) -> list[object]:
    return [*EXTRACTOR, *SMALL_BLOCKS, "--num-workers", n_workers, "--log-format", "json", "--profile", folder]


@pytest.mark.parametrize("n_workers", [0, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])])
def test_an_evaluation_tells_its_stages_and_blocks_and_traces_one_of_each_kind(
    catalogue_path: Path, models: dict[str, Path], tmp_path: Path, n_workers: int
) -> None:
    # The number format says which operator convolves; auto takes bf16 on some CPUs and fp32 on others.
    words = ("evaluate", "--catalogue", catalogue_path, "--model", models["concat"], "--extractor-precision", "fp32")
    lines = run(*words, *watched(tmp_path / "traces", n_workers), into=tmp_path / "watched")
    assert {line["job"] for line in lines} == {"evaluate"}
    told = [line for line in lines if line["message"].startswith("trace of a block")]
    assert {"embed", "retrieve", "score"} <= {line["stage"] for line in told}, "the driver searches for baselines too"
    assert all(line["block"] is not None for line in told)
    traces = traces_of(tmp_path / "traces")
    assert set(traces) == {"embed", "search", "score"}
    assert all(name in traces[kind] for kind, name in EXPECTED.items())
    run(*words, *EXTRACTOR, *SMALL_BLOCKS, "--num-workers", 0, into=tmp_path / "unwatched")
    assert bytes_of(tmp_path / "watched") == bytes_of(tmp_path / "unwatched")


@pytest.mark.parametrize("n_workers", [0, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])])
def test_what_pillow_says_of_an_image_is_a_log_line_that_names_it(tmp_path: Path, n_workers: int) -> None:
    """Once an image, on every worker; nothing of those that are rejects, and no line that is not of the log."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "x" * 50
    odd = [f"odd {n}.jpg" for n in range(8)]
    for name in odd:
        photo.save(tmp_path / name, exif=exif.tobytes()[:-30])  # the text is cut off
    photo.save(tmp_path / "good.jpg", exif=exif.tobytes())
    photo.convert("1").resize((9450, 9450)).save(tmp_path / "large.png")  # beyond Pillow's limit, below ours
    photo.save(tmp_path / "damaged.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "damaged.tif").read_bytes())
    content[100:140] = b"\xff" * 40
    (tmp_path / "damaged.tif").write_bytes(content)
    rows = [f"{name},{name},1,validation,True,True\n" for name in (*odd, "good.jpg", "large.png", "damaged.tif")]
    (tmp_path / "df.csv").write_text("id,path,label,split,is_query,is_gallery\n" + "".join(rows))
    words = ["embed", "--catalogue", tmp_path / "df.csv", "--log-format", "json", "--out", tmp_path / "embeddings"]
    words += [*EXTRACTOR, "--images-per-block", 3, "--num-workers", n_workers]
    done = subprocess.run(
        [sys.executable, "-m", "distributed_rerank", *map(str, words)], capture_output=True, text=True, timeout=240
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    told = [line for line in lines if line["logger"].endswith("image_warnings")]
    assert sorted(line["message"].partition(": ")[0] for line in told) == [repr(str(tmp_path / name)) for name in odd]
    assert all(line["level"] == "WARNING" and line["stage"] == "embed" for line in told)
    assert {line["block"] for line in told} == {1, 2, 3}


@pytest.mark.parametrize("n_workers", [0, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])])
def test_a_training_traces_a_step(catalogue_path: Path, tmp_path: Path, n_workers: int) -> None:
    words = ("train", "--catalogue", catalogue_path, "--epochs", 1)
    lines = run(*words, *watched(tmp_path / "traces", n_workers), into=tmp_path / "model")
    assert any(line["stage"] == "train" and "train-" in line["message"] for line in lines)
    assert {"train", "embed"} <= set(traces_of(tmp_path / "traces"))
    assert any("Backward" in name for name in traces_of(tmp_path / "traces")["train"])
