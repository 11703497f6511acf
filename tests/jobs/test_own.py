"""The documented examples of parts of one's own, by the commands, in one process and on Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from job_files import bytes_of
from safetensors.torch import load_file
from sklearn.metrics import ndcg_score

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
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


def test_own_parts_are_trained_and_measured_alike_in_one_process_and_on_ray(
    catalogue_path: Path, tmp_path: Path
) -> None:
    """Extractor, pairwise model and loss in training; chain step and metric in what measures it."""
    table = ["--catalogue", catalogue_path, *EXTRACTOR]
    own = ["--pairwise-model", "own_model:ProductSiamese", "--width", 8, "--loss", "own_loss:hardest", *TRAINING]
    words = ["--chain", EXAMPLES / "own_chain.json", "--own-metrics", "own_metric:ndcg", "--top-n", 5, "--n-items", 8]
    for workers in (0, 1):
        model, out = tmp_path / f"model {workers}", tmp_path / f"on {workers}"
        trained = run("train", *table, "--out", model, *own, "--num-workers", workers)
        assert trained.returncode == 0, trained.stderr
        done = run("evaluate", *table, "--out", out, "--model", tmp_path / "model 0", *words, "--num-workers", workers)
        assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "model 0" / "config.json").read_text())
    assert (content["model"], content["config"]["width"]) == ("own_model:ProductSiamese", 8)
    alone, on_ray = (load_file(tmp_path / f"model {workers}" / "model.safetensors") for workers in (0, 1))
    for name, weights in alone.items():
        torch.testing.assert_close(on_ray[name], weights, atol=1e-4, rtol=1e-3)
    assert bytes_of(tmp_path / "on 0") == bytes_of(tmp_path / "on 1") != {}
    metrics = json.loads((tmp_path / "on 0" / "metrics.json").read_text())
    assert "own_step:DemoteHubs(weight=0.5)" in metrics["chain"]
    assert 0 < metrics["first_stage"]["ndcg"] < metrics["oracle"]["ndcg"] <= 1
    assert len(metrics["difference"]["ndcg"]["ci95"]) == 2
    assert ">ndcg<" in (tmp_path / "on 0" / "report.html").read_text()


def test_example_of_a_metric_is_ndcg() -> None:
    ndcg = run_path(str(EXAMPLES / "own_metric.py"))["ndcg"]
    is_relevant = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    found = ndcg(is_relevant, torch.tensor([3, 1]))
    scores = np.arange(12, 0, -1)[None].repeat(2, axis=0)
    theirs = [ndcg_score(is_relevant[row : row + 1].numpy(), scores[row : row + 1], k=10) for row in (0, 1)]
    np.testing.assert_allclose(found.numpy(), theirs)


def test_example_of_a_loss_looks_at_the_hardest_pair_of_each_list() -> None:
    hardest = run_path(str(EXAMPLES / "own_loss.py"))["hardest"]
    logits = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.0, -9.0]], requires_grad=True)
    is_present = torch.tensor([[True, True, True], [True, True, False]])
    values = hardest(logits, torch.tensor([[True, False, False], [True, False, False]]), is_present)
    np.testing.assert_allclose(values.detach().numpy(), np.log1p(np.exp([1 + 0.5 - 1, 1 + 3 - 0])), rtol=1e-6)
    values.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairwise-model", "no_such.module:Model"], "the module no_such.module cannot be imported"),
        (["--pairwise-model", "own_model:Nothing"], "the module own_model has no Nothing"),
        (["--pairwise-model", "own_model:ProductConfig"], "does not say which config it has"),
        (["--loss", "own_loss:nothing"], "the module own_loss has no nothing"),
        (["--loss", "listwize"], "--loss listwize is unknown; known are bce, listwise, ranknet, margin, or your own"),
        (["--loss", "own_metric:ndcg"], "must take (logits, is_positive, is_present)"),
        (["--extractor", "own_extractor:Nothing"], "the module own_extractor has no Nothing"),
        (["--extractor", "os:getcwd"], "it must return a torch.nn.Module"),
    ],
)
def test_wrong_names_are_told_in_one_line(words: list[str], message: str, catalogue_path: Path, tmp_path: Path) -> None:
    rest = [] if "--extractor" in words else EXTRACTOR
    if "own_metric:ndcg" in words:  # told at the first step
        rest = [*rest, *TRAINING, "--pairwise-model", "own_model:ProductSiamese"]
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
