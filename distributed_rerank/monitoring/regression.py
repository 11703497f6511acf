"""Whether a difference between two runs is a regression, and where it is worst.

A regression is a loss that is real and matters: the 95 % interval of run - baseline lies below 0, and its mean below
-tolerance. A loss within the tolerance is none, nor is one that these queries cannot tell from chance.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.comparison import Comparison
from distributed_rerank.report.formatting import count_of, interval, metric_name, signed


def is_regression(difference: Mapping[str, Any], tolerance: float) -> bool:
    """Whether one metric's `difference` (as in metrics.json) is a regression beyond `tolerance` >= 0."""
    return difference["ci95"][1] < 0 and difference["mean"] < -tolerance


def describe(comparison: Comparison, metric: str, tolerance: float, against: str) -> str:
    """One sentence: the metric, its change and interval, whether that is a regression, and the worst category if so.

    Raises BadInput for a metric that the runs do not both have.
    """
    differences = comparison.summary["difference"]
    if metric not in differences:
        raise BadInput(f"--metric {metric} is not in both runs; they share {', '.join(differences)}")
    change = differences[metric]
    moved = f"{metric_name(metric)} {signed(change['mean'])} (95 % interval {interval(change)}) against {against}"
    if not is_regression(change, tolerance):
        return f"{moved}, no regression beyond {tolerance:g}"
    return f"{moved}, a regression beyond {tolerance:g}; {worst_group(comparison, metric)}"


def worst_group(comparison: Comparison, metric: str) -> str:
    """The category that lost most, in words; the label that lost most if there are no categories.

    It has the lowest mean change among the categories whose own loss is beyond chance: an interval below 0, from at
    least two labels, since one label has no interval. Without such a category it is the lowest of all.
    """
    categories = comparison.summary["categories"]
    if not categories:
        return "no categories in the catalogue; worst label: " + _worst_label(comparison.changes, metric)

    def rank(name: str) -> tuple[bool, float, str]:
        change = categories[name]["difference"][metric]
        return (not (change["n_clusters"] > 1 and change["ci95"][1] < 0), change["mean"], name)

    name = min(categories, key=rank)
    mean, n_queries = categories[name]["difference"][metric]["mean"], categories[name]["n_queries"]
    return f"worst category: {name!r} ({signed(mean)} over {count_of(n_queries)} queries)"


def _worst_label(changes: pd.DataFrame, metric: str) -> str:
    by_label = changes.groupby("label", sort=True)[metric].agg(["mean", "size"])
    position = int(np.asarray(by_label["mean"]).argmin())
    mean, size = by_label.iloc[position]
    return f"{by_label.index[position]!r} ({signed(mean)} over {count_of(int(size))} queries)"
