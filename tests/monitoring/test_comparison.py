"""Two runs of one catalogue: paired by query, refused across catalogues."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_runs import CATEGORIES, planted_catalogue, planted_ranking, write_run

from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.comparison import compare_runs, comparison_in_text
from distributed_rerank.storage import artifacts, manifests


def values_of(folder: Path, column: str) -> pd.Series:
    return pd.read_parquet(folder / "per_query.parquet").set_index("query_id")[column]


def test_compare_runs_differences_are_those_of_the_final_rankings(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    write_run(tmp_path / "a", catalogue, planted_ranking(catalogue, {"cups": 0.2}))
    after = planted_ranking(catalogue, {"toys": 0.6})
    write_run(tmp_path / "b", catalogue, planted_ranking(catalogue, {"cups": 0.2}), after)
    summary = compare_runs(tmp_path / "a", tmp_path / "b").summary
    change = values_of(tmp_path / "b", "cmc@1_after") - values_of(tmp_path / "a", "cmc@1_before")
    found = summary["difference"]["cmc@1"]
    assert found["mean"] == pytest.approx(change.mean())
    assert (found["n_better"], found["n_worse"]) == ((change > 0).sum(), (change < 0).sum())
    assert found["n_clusters"] == 60
    assert summary["run"]["cmc@1"] - summary["baseline"]["cmc@1"] == pytest.approx(change.mean())
    assert sorted(summary["categories"]) == sorted(CATEGORIES)
    toys = summary["categories"]["toys"]
    assert toys["n_queries"] == 80
    of_toys = change[values_of(tmp_path / "a", "category") == "toys"]
    assert toys["difference"]["cmc@1"]["mean"] == pytest.approx(of_toys.mean())


def test_compare_runs_of_equal_runs_is_zero_without_width(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=6)
    for name in "ab":
        write_run(tmp_path / name, catalogue, planted_ranking(catalogue, {"cups": 0.5}))
    differences = compare_runs(tmp_path / "a", tmp_path / "b").summary["difference"]
    assert {tuple(found["ci95"]) for found in differences.values()} == {(0.0, 0.0)}
    assert {found["p_value"] for found in differences.values()} == {1.0}


def test_compare_runs_of_other_catalogues_names_both_digests(tmp_path: Path) -> None:
    catalogues = [planted_catalogue(tmp_path / f"catalogue {n}", n_labels=n) for n in (5, 6)]
    for name, catalogue in zip("ab", catalogues, strict=True):
        write_run(tmp_path / name, catalogue, planted_ranking(catalogue, {}))
    with pytest.raises(BadInput) as caught:
        compare_runs(tmp_path / "a", tmp_path / "b")
    assert all(catalogue.digest()[:16] in str(caught.value) for catalogue in catalogues)
    assert "\n" not in str(caught.value)


def test_compare_runs_counts_queries_that_one_side_rejected(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=6)
    for name in "ab":
        write_run(tmp_path / name, catalogue, planted_ranking(catalogue, {}))
    table = pd.read_parquet(tmp_path / "b" / "per_query.parquet")
    with manifests.rewriting(tmp_path / "b" / "per_query.parquet"):
        table.drop(index=[0, 5]).to_parquet(tmp_path / "b" / "per_query.parquet", index=False)
    summary = compare_runs(tmp_path / "a", tmp_path / "b").summary
    assert (summary["n_queries"], summary["n_only_in_baseline"], summary["n_only_in_run"]) == (22, 2, 0)


def test_compare_runs_refuses_a_folder_of_another_stage(tmp_path: Path) -> None:
    with artifacts.stage(tmp_path / "embeddings", artifacts.make_fingerprint("embed", catalogue="0")) as staging:
        staging.finish()
    with pytest.raises(BadInput, match="is an output of 'embed'; give a folder"):
        compare_runs(tmp_path / "embeddings", tmp_path / "embeddings")


def test_comparison_in_text_lists_every_metric_and_the_worst_category_first(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    write_run(tmp_path / "a", catalogue, planted_ranking(catalogue, {}))
    write_run(tmp_path / "b", catalogue, planted_ranking(catalogue, {"cups": 0.9, "books": 0.2}))
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    text = comparison_in_text(comparison.summary)
    metrics = [line.split()[0] for line in text.splitlines()[3:] if line][: len(comparison.summary["difference"])]
    assert {"CMC@1", "mAP@10", "MRR"} <= set(metrics)
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["cups", "books", "toys"]
    assert np.isclose(comparison.changes["cmc@1"].mean(), comparison.summary["difference"]["cmc@1"]["mean"])
