"""The benchmarks that `make bench-quick` leaves out finish with --quick and give the rows that they promise."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Rows = dict[str, dict]


def run_quick(script: str, folder: Path, *flags: str) -> Rows:
    """The rows of one run by name, checked for their form."""
    file = folder / "rows.json"
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", str(file), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(file.read_text())
    for row in rows:
        assert list(row) == ["name", "unit", "ours", "theirs", "ratio"]
        assert math.isfinite(row["ours"])
        if row["theirs"]:
            assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=1e-2)
        assert row["name"] in done.stdout
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def test_quality_quick_tables_every_method_with_its_interval(tmp_path: Path) -> None:
    rows = run_quick("quality.py", tmp_path)
    assert rows["first stage: map@10"]["ours"] == rows["first stage: map@10"]["theirs"]
    trained = ("OML recipe", "token, pairwise step", "token, chain", "concat, pairwise step", "concat, chain")
    for method in ("k-reciprocal (20, 6, 0.3)", "alpha-QE + DBA (5, 3)", *(f"{name}, seed 0" for name in trained)):
        gain, low, high = (
            rows[f"{method}: map@10 {end}"]["ours"] for end in ("gain", "gain, low end", "gain, high end")
        )
        assert low <= gain <= high
        row = rows[f"{method}: map@10"]
        assert gain == pytest.approx(100 * (row["ours"] - row["theirs"]), abs=0.1)


def test_seen_labels_quick_has_a_row_for_each_case(tmp_path: Path) -> None:
    rows = run_quick("seen_labels.py", tmp_path)
    assert "as it is, not tuned: taken as evidence" in rows
    assert len(rows) == 22


def test_few_labels_quick_has_mean_worst_and_number_of_steps(tmp_path: Path) -> None:
    rows = run_quick("few_labels.py", tmp_path)
    assert rows["4 labels: worst draw"]["ours"] <= rows["4 labels: mean gain"]["ours"]
    assert 0 <= rows["4 labels: draws with a step"]["ours"] <= 2


def test_label_free_quick_has_coverage_alarms_and_planted_queries(tmp_path: Path) -> None:
    rows = run_quick("label_free.py", tmp_path)
    for name in ("false alarms", "CMC@1: intervals that cover", "precision@10: intervals that cover"):
        assert 0 <= rows[name]["ours"] <= 100
    planted = [name for name in rows if ": CMC@1 [" in name]
    assert [name.partition(":")[0] for name in planted] == [
        "plain", "blurred", "with others", "plain, half of the gallery"
    ]  # fmt: skip
    assert all(0 <= rows[name]["theirs"] <= 1 for name in planted)


def test_never_harm_quick_counts_catalogues_of_each_kind(tmp_path: Path) -> None:
    rows = run_quick("never_harm.py", tmp_path)
    assert len(rows) == 12
    for kind in ("train labels shuffled", "all labels shuffled", "perfect first stage"):
        assert 0 <= rows[f"{kind}: harmed"]["ours"] <= 100
        assert rows[f"{kind}: worst"]["ours"] <= rows[f"{kind}: mean change"]["ours"]


def test_compare_oml_quick_agrees_with_oml(tmp_path: Path) -> None:
    environment = os.environ.get("DISTRIBUTED_RERANK_OML_ENV")
    if not environment:
        pytest.skip("set DISTRIBUTED_RERANK_OML_ENV to a folder for OML's environment")
    rows = run_quick("compare_oml.py", tmp_path, "--oml-env", environment)
    assert rows["re-rank, fp32, one process: largest difference of pair distances"]["ours"] < 1e-4
    assert rows["re-rank, fp32, one process: queries with the same first candidate"]["ours"] == 1
    assert rows["exact kNN: places with the same id"]["ours"] > 0.999
    for name in ("re-rank, fp32, one process", "embed, fp32, one process", "train, fp32, one process"):
        assert rows[name]["ratio"] > 0


def test_compare_oml_without_the_peer_says_how_to_name_it(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "compare_oml.py"), "--quick", "--bench", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--bench" in done.stderr
    assert "DISTRIBUTED_RERANK_BENCH" in done.stderr


def test_chaos_quick_gives_the_bytes_of_undisturbed_runs_and_finds_all_damage(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert len(found["faults"]) >= 6
    for row in found["faults"]:
        assert row["equal"], row
        assert row["fault"] in done.stdout
    kinds = {row["kind"]: row for row in found["damage"]}
    for kind in ("block of a stage", "state of a training", "encodings of a training", "what the run was begun with"):
        assert f"unfinished: {kind}" in kinds
    for name in ("manifest.json", "model.safetensors", "embeddings.parquet", "report.html"):
        assert any(kind.endswith(f"out: {name}") for kind in kinds), name
    for row in kinds.values():
        assert row["tried"] == 10
        assert row["found"] == 10, row
        assert row["cut_found"] in (None, 10), row


def test_online_quick_measures_against_its_bars(tmp_path: Path) -> None:
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    rows = run_quick("online.py", tmp_path, "--photos", str(tmp_path))
    for name in ("with the query's decoding", "query encoded before"):
        median, late = (rows[f"one query x 50, {name}: {part}"] for part in ("p50", "p99"))
        assert 0 < median["ours"] <= late["ours"]
        assert late["theirs"] == pytest.approx(3 * median["ours"], rel=1e-2)
    assert rows["import and load"]["theirs"] == 6


def test_serve_quick_loses_no_request_with_a_killed_replica(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="Ray Serve is absent: pip install 'distributed-rerank[serve]'")
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    rows = run_quick("serve.py", tmp_path, "--photos", str(tmp_path))
    assert rows["requests"]["ours"] == 100
    assert rows["replicas killed"]["ours"] == 1
    assert rows["without an answer of 200"]["ours"] == 0
    assert rows["answers unlike Reranker.rank's"]["ours"] == 0
    assert rows["exit code after Ctrl-C"]["ours"] == 0
    assert 0 < rows["p50"]["ours"] <= rows["p99"]["ours"] <= rows["slowest"]["ours"]


def test_scale_quick_tells_the_drivers_memory_and_that_of_logits(tmp_path: Path) -> None:
    rows = run_quick("scale.py", tmp_path, "--parts", "driver-memory", "logits")
    assert rows["driver, 8,000 images: evaluate"]["ours"] >= rows["driver, 8,000 images: held"]["ours"]
    assert {f"driver: growth of {name} beyond the catalogue" for name in ("embed", "evaluate", "score_plan")} <= set(
        rows
    )
    assert rows["logits x 4: time"]["ours"] > 0
