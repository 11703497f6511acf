"""What counts as a regression, and which category is named."""

from pathlib import Path

import pandas as pd
import pytest
from planted_runs import planted_catalogue, planted_ranking, write_run

from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.comparison import Comparison, compare_runs
from distributed_rerank.monitoring.regression import describe, is_regression, worst_group


@pytest.mark.parametrize(
    ("mean", "high", "expected"),
    [(-0.02, -0.01, True), (-0.02, 0.0, False), (-0.005, -0.004, False), (0.02, 0.03, False), (-0.0051, -1e-9, True)],
)
def test_is_regression_needs_a_real_loss_beyond_the_tolerance(mean: float, high: float, expected: bool) -> None:
    assert is_regression({"mean": mean, "ci95": [-0.1, high]}, 0.005) is expected


def compared(tmp_path: Path, miss: dict[str, float], with_category: bool = True) -> Comparison:
    catalogue = planted_catalogue(tmp_path / "catalogue", with_category=with_category)
    write_run(tmp_path / "a", catalogue, planted_ranking(catalogue, {}))
    write_run(tmp_path / "b", catalogue, planted_ranking(catalogue, miss))
    return compare_runs(tmp_path / "a", tmp_path / "b")


def test_describe_of_a_planted_loss_names_metric_interval_and_category(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"toys": 0.8, "books": 0.1})
    said = describe(comparison, "map@10", 0.005, "the baseline")
    found = comparison.summary["difference"]["map@10"]
    assert said.startswith(f"mAP@10 −{-found['mean']:.3f} (95 % interval −{-found['ci95'][0]:.3f} to ")
    assert " against the baseline, a regression beyond 0.005; worst category: 'toys'" in said
    assert describe(comparison, "map@10", 0.9, "the baseline").endswith(", no regression beyond 0.9")


def test_describe_of_an_unknown_metric_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--metric map@7 is not in both runs; they share .*map@10"):
        describe(compared(tmp_path, {}), "map@7", 0.005, "the baseline")


def test_worst_group_without_categories_is_the_label_that_lost_most(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"": 0.3}, with_category=False)
    by_label = comparison.changes.groupby("label")["map@10"].mean()
    assert f"worst label: {by_label.idxmin()!r}" in worst_group(comparison, "map@10")


def test_worst_group_prefers_a_loss_beyond_chance_to_a_larger_one_of_few_labels() -> None:
    def category(mean: float, high: float, n_clusters: int) -> dict:
        return {"n_queries": 9, "difference": {"m": {"mean": mean, "ci95": [-1.0, high], "n_clusters": n_clusters}}}

    categories = {"sure": category(-0.1, -0.05, 20), "lucky": category(-0.5, 0.1, 3), "single": category(-0.6, -0.6, 1)}
    assert "'sure'" in worst_group(Comparison({"categories": categories}, pd.DataFrame()), "m")
    del categories["sure"]
    assert "'single'" in worst_group(Comparison({"categories": categories}, pd.DataFrame()), "m")
