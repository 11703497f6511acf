"""A tiny catalogue, saved models, and the jobs themselves: in this process, or as processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from distributed_rerank import command_line
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig, DistanceSiameseConfig
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.saving import save_model

ROOT = Path(__file__).resolve().parents[2]
N_LABELS, N_IMAGES = 12, 4
BACKBONE = ExtractorConfig(name="test_resnet", weights="none", image_size=32, resize="square")


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    code: int
    errors: str


@pytest.fixture(scope="session")
def catalogue_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 validation and 40 train images of 40 px; the first image of a label is its query alone, three
    categories,
    the second and third image of every fourth label in one sequence."""
    folder = tmp_path_factory.mktemp("catalogue")
    generator = np.random.default_rng(3)
    rows = []
    for label in range(N_LABELS + 10):
        split = "validation" if label < N_LABELS else "train"
        colours = generator.integers(100, 156, (3, 3)).tolist()
        for image in range(N_IMAGES):
            name = f"{label:02d}-{image}.png"
            draw(folder / name, label, colours, generator)
            flags = (image != 2, image != 0) if split == "validation" else ("", "")
            sequence = f"s{label}" if label % 4 == 0 and image in (1, 2) else ""
            rows.append((label, name, split, *flags, "abc"[label % 3], sequence))
    columns = ["label", "path", "split", "is_query", "is_gallery", "category", "sequence"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "df.csv", index=False)
    return folder / "df.csv"


def draw(path: Path, label: int, colours: list[list[int]], generator: np.random.Generator) -> None:
    picture = Image.new("RGB", (40, 40), tuple(colours[0]))
    pen = ImageDraw.Draw(picture)
    x, y = generator.integers(0, 16, 2).tolist()
    pen.ellipse((x, y, x + 12 + label, y + 14), fill=tuple(colours[1]))
    pen.rectangle((y + 6, x + 6, y + 14, x + 8 + label), fill=tuple(colours[2]))
    noise = generator.integers(-60, 61, (40, 40, 3))
    pixels = np.clip(np.asarray(picture).astype(int) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved model folders by name: identity (keeps the order), random (changes it), concat."""
    folder = tmp_path_factory.mktemp("models")
    built = {
        "identity": DistanceSiamese(DistanceSiameseConfig(extractor=BACKBONE)),
        "random": DistanceSiamese(DistanceSiameseConfig(extractor=BACKBONE, identity_init=False)),
        "concat": ConcatSiamese(ConcatSiameseConfig(extractor=BACKBONE, hidden_dims=(8,))),
    }
    for name, model in built.items():
        save_model(model, folder / name)
    step = {"step": "pairwise", "top_n": 6, "rule": "fuse", "weight": 0.5, "temperature": 0.01}
    chain = {"schema_version": 2, "steps": [step], "calibration": {"slope": 2.0, "intercept": 0.5}}
    (folder / "concat" / "chain.json").write_text(json.dumps(chain))
    return {name: folder / name for name in built}


@pytest.fixture
def run_job(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`run_job("evaluate", "--catalogue", ...)`: that command in this process.

    The work is done without Ray (`--num-workers 0`); `on_ray=True` does it on the shared Ray. That both give the same
    bytes is test_same_bytes.py.
    """

    def run(name: str, *arguments: object, on_ray: bool = False) -> Outcome:
        words = [name, *map(str, arguments)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line.main(words if on_ray else [*words, "--num-workers", "0"])
        return Outcome(int(stop.value.code or 0), capsys.readouterr().err)

    return run


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start_job("evaluate", ...)` as a process with a Ray of its own; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
        # As from a terminal: what a script starts in the background ignores Ctrl-C, and so do its children.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=tmp_path, env=environment_of_jobs() | environment,
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def environment_of_jobs() -> dict[str, str]:
    """This process's, without what ties it to a Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = [str(ROOT), *filter(None, [own.get("PYTHONPATH")])]
    return own | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
