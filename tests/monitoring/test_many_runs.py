"""Several results compared: against loops, resampling by numpy, all sign flips, and Holm's steps as he wrote them."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted_runs import planted_catalogue, planted_ranking, write_run

from distributed_rerank.config.choices import MissingLists
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.exports import write_trec_run
from distributed_rerank.data.judgement_files import read_judgements
from distributed_rerank.data.relevance import without_junk
from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.many_runs import compare_all
from distributed_rerank.storage import manifests
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.statistics import holm

N_LABELS = 10
MISSES = {"a_model": {"cups": 0.1}, "b": {"cups": 0.9, "books": 0.4}, "c": {"toys": 0.8, "cups": 0.2, "books": 0.9}}
ROOT = Path(__file__).resolve().parents[2]


def rankings(catalogue: Catalogue) -> dict[str, CandidateLists]:
    return {name: planted_ranking(catalogue, miss, seed) for seed, (name, miss) in enumerate(MISSES.items())}


def by_loop(catalogue: Catalogue, lists: CandidateLists) -> dict[str, np.ndarray]:
    """mAP@10 and CMC@1 of every query, one place after the other."""
    found: dict[str, list[float]] = {"map@10": [], "cmc@1": []}
    for query, items in zip(lists.query_items.tolist(), lists.items.tolist(), strict=True):
        hits = [catalogue.labels[item] == catalogue.labels[query] for item in items[:10]]
        precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
        found["map@10"].append(sum(precisions) / 3)
        found["cmc@1"].append(float(hits[0]))
    return {key: np.array(values) for key, values in found.items()}


def holm_in_words(p_values: list[float]) -> list[float]:
    """Step down: the i-th smallest of m is compared with (m - i + 1) times itself, never below the one before."""
    result: dict[int, float] = {}
    left = dict(enumerate(p_values))
    before = 0.0
    while left:
        number = min(left, key=lambda n: (left[n], n))
        before = max(before, min(1.0, len(left) * left.pop(number)))
        result[number] = before
    return [result[number] for number in range(len(p_values))]


def test_figures_are_those_of_an_independent_computation(tmp_path: Path) -> None:
    """Two evaluations, one of them re-ranked, and a TREC run of another system. An end may lie one query apart."""
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=N_LABELS)
    lists = rankings(catalogue)
    write_run(tmp_path / "a_model", catalogue, lists["a_model"])
    write_run(tmp_path / "b", catalogue, lists["a_model"], lists["b"])
    write_trec_run(tmp_path / "c", [candidates_table(lists["c"], catalogue.ids)], "theirs")
    paths = [tmp_path / name for name in MISSES]
    compare_all(paths, tmp_path / "out", catalogue=catalogue, seed=3)
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    values = {name: by_loop(catalogue, ranking) for name, ranking in lists.items()}
    assert (summary["n_queries"], summary["n_labels"]) == (4 * N_LABELS, N_LABELS)
    for run in summary["runs"]:
        for key in ("map@10", "cmc@1"):
            assert run[key] == pytest.approx(values[run["name"]][key].mean(), abs=1e-12)
    flips = np.array(list(itertools.product((-1, 1), repeat=N_LABELS)))
    generator = np.random.default_rng(0)
    n_apart = 0
    assert len(summary["pairs"]) == 6
    for pair in summary["pairs"]:
        change = values[pair["run"]][pair["metric"]] - values[pair["baseline"]][pair["metric"]]
        assert pair["mean"] == pytest.approx(change.mean(), abs=1e-12)
        assert (pair["n_better"], pair["n_worse"]) == ((change > 0).sum(), (change < 0).sum())
        sums = np.bincount(catalogue.labels, change)
        exact = (np.abs(flips @ sums) >= abs(sums.sum()) - 1e-9).mean()
        assert pair["p_value"] == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000) + 2e-4)
        drawn = sums[generator.integers(0, N_LABELS, (20_000, N_LABELS))].sum(axis=1) / len(change)
        assert pair["ci95"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1.01 / len(change))
        n_apart += exact < 0.05
    assert n_apart > 0, "nothing differs: nothing is shown"
    p_values = [pair["p_value"] for pair in summary["pairs"]]
    assert [pair["p_holm"] for pair in summary["pairs"]] == pytest.approx(holm_in_words(p_values), abs=1e-12)


def test_holm_is_holm() -> None:
    generator = np.random.default_rng(1)
    for n in (1, 2, 5, 20):
        values = np.round(generator.random(n) ** 3, 2).tolist()
        assert holm(values) == pytest.approx(holm_in_words(values), abs=1e-12)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_table_is_one_in_three_formats_and_a_second_start_makes_none(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=N_LABELS)
    for name, ranking in rankings(catalogue).items():
        write_run(tmp_path / name, catalogue, ranking)
    (tmp_path / "c").rename(tmp_path / "<b>c|50%")
    paths = [tmp_path / "a_model", tmp_path / "b", tmp_path / "<b>c|50%"]
    command = [sys.executable, "-m", "distributed_rerank", "compare", *map(str, paths), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts = {kind: (tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("md", "tex", "html")}
    rows = [line for line in texts["md"].splitlines() if line.startswith("| ")]
    assert len(rows) == 7
    assert "| a\\_model | \\<b>c\\|50% | mAP@10 |" in texts["md"]
    assert r"a\_model & <b>c|50\% & mAP@10 &" in texts["tex"]
    assert texts["tex"].count(r" \\") == 7
    tables = pd.read_html(tmp_path / "out" / "comparison.html")
    assert tables[0].shape == (6, 10)
    assert set(tables[0]["B"]) == {"b", "<b>c|50%"}
    assert "Content-Security-Policy" in texts["html"]
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert tables[0]["p"].tolist() == pytest.approx([pair["p_value"] for pair in summary["pairs"]], abs=1e-4)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    compare_all(paths, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(BadInput, match="--overwrite"):
        compare_all(paths[:2], tmp_path / "out")


def refusal(paths: list[Path], catalogue: Catalogue | None = None) -> str:
    with pytest.raises(BadInput) as error:
        compare_all(paths, paths[0].parent / "out", catalogue=catalogue)
    assert "\n" not in str(error.value)
    assert not (paths[0].parent / "out").exists()
    return str(error.value)


def test_what_cannot_be_paired_is_refused_by_name(tmp_path: Path) -> None:
    catalogue, other = (planted_catalogue(tmp_path / f"catalogue {n}", n_labels=n) for n in (6, 7))
    ranking = planted_ranking(catalogue, {"cups": 0.5})
    for name in ("a", "b", "label", "relevant"):
        write_run(tmp_path / name, catalogue, ranking)
    write_run(tmp_path / "other", other, planted_ranking(other, {}))
    for name, change in {
        "b": lambda table: table.drop(index=[0, 5]),
        "label": lambda table: table.assign(label=["label 001", *table["label"][1:]]),
        "relevant": lambda table: table.assign(n_relevant=[2, *table["n_relevant"][1:]]),
    }.items():
        file = tmp_path / name / "per_query.parquet"
        table = pd.read_parquet(file)
        with manifests.rewriting(file):
            change(table).to_parquet(file, index=False)
    message = refusal([tmp_path / "a", tmp_path / "other"])
    assert catalogue.digest()[:16] in message
    assert other.digest()[:16] in message
    assert "a measured 2 queries that b did not, first 'item 000-0'" in refusal([tmp_path / "a", tmp_path / "b"])
    assert "a measured 2 queries that b did not" in refusal([tmp_path / "b", tmp_path / "a"])
    assert "has label label 000 in a and label 001 in label" in refusal([tmp_path / "a", tmp_path / "label"])
    assert "has n_relevant 3 in a and 2 in relevant" in refusal([tmp_path / "a", tmp_path / "relevant"])
    assert "is given twice" in refusal([tmp_path / "a", tmp_path / "a"])
    few = candidates_table(ranking[5:], catalogue.ids)
    write_trec_run(tmp_path / "few.trec", [few], "theirs")
    assert "5 of 24 queries have no list" in refusal([tmp_path / "a", tmp_path / "few.trec"], catalogue)
    assert "give the --catalogue" in refusal([tmp_path / "a", tmp_path / "few.trec"])


def test_wrong_words_are_one_line(tmp_path: Path) -> None:
    wrong = {
        ("a",): "1 result is nothing to compare",
        ("a", "b"): "a does not exist",
        ("tests", "docs", "--missing-lists", "miss"): "--missing-lists has no effect: no file with lists is compared",
        ("tests", "docs", "--judgements", "x.csv"): "--judgements has no effect: no file with lists is compared",
    }
    for words, message in wrong.items():
        command = [sys.executable, "-m", "distributed_rerank", "compare", *words, "--out", "x"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr


@pytest.mark.parametrize(("missing", "other"), [("miss", "leave_out"), ("leave_out", "miss")])
def test_queries_without_a_list_count_as_the_user_says(
    tmp_path: Path, missing: MissingLists, other: MissingLists
) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=N_LABELS)
    ranking, theirs = planted_ranking(catalogue, {"cups": 0.3}), planted_ranking(catalogue, {"cups": 0.9}, 1)
    write_run(tmp_path / "ours", catalogue, ranking)
    kept = torch.arange(len(theirs)) % 4 != 1
    write_trec_run(tmp_path / "theirs", [candidates_table(theirs[kept.nonzero()[:, 0]], catalogue.ids)], "theirs")
    paths = [tmp_path / "ours", tmp_path / "theirs"]
    text = compare_all(paths, tmp_path / "out", catalogue=catalogue, missing_lists=missing)
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    ours, others, is_kept = by_loop(catalogue, ranking), by_loop(catalogue, theirs), kept.numpy()
    for key in ("map@10", "cmc@1"):
        wanted = ours[key].mean(), (others[key] * is_kept).mean()
        if missing == "leave_out":
            wanted = ours[key][is_kept].mean(), others[key][is_kept].mean()
        assert [run[key] for run in summary["runs"]] == pytest.approx(wanted, abs=1e-12)
    assert summary["n_queries"] == (30 if missing == "leave_out" else 40)
    becomes = {"miss": "count as misses", "leave_out": "are left out of all results"}
    assert f"theirs has no list for 10 of the queries, which {becomes[missing]}." in text
    with pytest.raises(BadInput, match="--overwrite"):
        compare_all(paths, tmp_path / "out", catalogue=catalogue, missing_lists=other)


def test_junk_of_judgements_is_no_place_in_the_lists_of_a_file(tmp_path: Path) -> None:
    """The second candidate of each query is junk; the evaluation left it out before it measured."""
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=N_LABELS)
    lists = planted_ranking(catalogue, {"cups": 0.4})
    labels = torch.from_numpy(catalogue.labels)
    grades = (labels[lists.items] == labels[lists.query_items][:, None]).long()
    grades[:, 1] = -1
    judged_pairs = candidates_table(lists, catalogue.ids).to_pandas()[["query_id", "gallery_id"]]
    judged_pairs.assign(relevance=grades.flatten().numpy()).to_csv(tmp_path / "judged.csv", index=False)
    judged = replace(catalogue, judgements=read_judgements(str(tmp_path / "judged.csv"), *catalogue.roles()))
    write_run(tmp_path / "ours", judged, without_junk(lists, judged))
    write_trec_run(tmp_path / "theirs", [candidates_table(lists, catalogue.ids)], "theirs")
    compare_all([tmp_path / "ours", tmp_path / "theirs"], tmp_path / "out", catalogue=judged)
    first, second = json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]
    assert {key: first[key] for key in ("map@10", "cmc@1")} == {key: second[key] for key in ("map@10", "cmc@1")}
    assert 0 < first["map@10"] < 1
