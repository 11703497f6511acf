"""The documented examples of an own pairwise model and an own extractor, by the commands, in one process and on Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_files import bytes_of

ROOT = Path(__file__).parents[2]
TRAINING = [
    "--epochs",
    "1",
    "--steps-per-epoch",
    "2",
    "--lists-per-step",
    "4",
    "--n-negatives",
    "2",
    "--n-items",
    "8",
    "--top-n",
    "4",
]
EXTRACTOR = ["--extractor", "own_extractor:colours", "--extractor-args", "grid=3", "--image-size", "32"]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "docs" / "examples")])
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distributed_rerank", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)


def test_own_model_and_extractor_are_trained_and_measured_in_one_process_and_on_ray(
    catalogue_path: Path, tmp_path: Path
) -> None:
    table = ["--catalogue", catalogue_path, *EXTRACTOR]
    trained = run(
        "train", *table, "--out", tmp_path / "model", "--pairwise-model", "own_model:ProductSiamese", "--width", 8,
        *TRAINING, "--num-workers", 0,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (content["model"], content["config"]["width"]) == ("own_model:ProductSiamese", 8)
    for workers in (0, 1):
        out = tmp_path / f"on {workers}"
        words = ["--model", tmp_path / "model", "--chain", "replace", "--top-n", 5, "--n-items", 8]
        done = run("rerank", *table, "--out", out, *words, "--num-workers", workers)
        assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "on 0") == bytes_of(tmp_path / "on 1") != {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairwise-model", "no_such.module:Model"], "the module no_such.module cannot be imported"),
        (["--pairwise-model", "own_model:Nothing"], "the module own_model has no Nothing"),
        (["--pairwise-model", "own_model:ProductConfig"], "does not say which config it has"),
        (["--extractor", "own_extractor:Nothing"], "the module own_extractor has no Nothing"),
        (["--extractor", "os:getcwd"], "it must return a torch.nn.Module"),
    ],
)
def test_wrong_names_are_told_in_one_line(words: list[str], message: str, catalogue_path: Path, tmp_path: Path) -> None:
    rest = [] if "--extractor" in words else EXTRACTOR
    done = run("train", "--catalogue", catalogue_path, "--out", tmp_path / "o", *rest, *words, "--num-workers", 0)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr


def test_options_of_an_own_model_are_in_its_help() -> None:
    done = run("train", "--pairwise-model", "own_model:ProductSiamese", "--help-all")
    assert done.returncode == 0, done.stderr
    assert "--width" in done.stdout
    assert "Width of the hidden layer" in done.stdout
