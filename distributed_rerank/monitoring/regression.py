"""When a difference between two runs is a regression, and where it is worst. Layer 3.

A regression is a loss that is real and that matters: the upper end of the 95 % interval of run - baseline lies below 0,
and its mean below -tolerance. A loss within the tolerance, or one that these queries cannot tell from chance, is none.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.comparison import Comparison
from distributed_rerank.report.formatting import count_of, metric_name, signed


def is_regression(difference: Mapping[str, Any], tolerance: float) -> bool:
    """Whether one metric's `difference` (as metrics.json spells it) is a regression beyond `tolerance` >= 0."""
    return difference["ci95"][1] < 0 and difference["mean"] < -tolerance


def describe(comparison: Comparison, metric: str, tolerance: float, against: str) -> str:
    """One sentence: the metric, its change and interval, whether that is a regression, and the worst category if so.

    Raises BadInput for a metric that the runs do not both have.
    """
    differences = comparison.summary["difference"]
    if metric not in differences:
        raise BadInput(f"--metric {metric} is not in both runs; they share {', '.join(differences)}")
    found = differences[metric]
    low, high = found["ci95"]
    interval = f"95 % interval {signed(low)} to {signed(high)}"
    moved = f"{metric_name(metric)} {signed(found['mean'])} ({interval}) against {against}"
    if not is_regression(found, tolerance):
        return f"{moved}, no regression beyond {tolerance:g}"
    return f"{moved}, a regression beyond {tolerance:g}; {worst_group(comparison, metric)}"


def worst_group(comparison: Comparison, metric: str) -> str:
    """The category that lost most, in words; without categories the label.

    The lowest mean change among the categories whose loss is itself beyond chance (interval below 0, from two labels or
    more, since one label has no interval); among all of them where there is no such category.
    """
    categories = comparison.summary["categories"]
    if not categories:
        return "no categories in the catalogue; worst label: " + _worst_label(comparison.changes, metric)

    def rank(name: str) -> tuple[bool, float, str]:
        found = categories[name]["difference"][metric]
        return (not (found["n_clusters"] > 1 and found["ci95"][1] < 0), found["mean"], name)

    name = min(categories, key=rank)
    found = categories[name]["difference"][metric]
    return f"worst category: {name!r} ({signed(found['mean'])} over {count_of(categories[name]['n_queries'])} queries)"


def _worst_label(changes: pd.DataFrame, metric: str) -> str:
    by_label = changes.groupby("label", sort=True)[metric].agg(["mean", "size"])
    position = int(np.asarray(by_label["mean"]).argmin())
    mean, size = by_label.iloc[position]
    return f"{by_label.index[position]!r} ({signed(mean)} over {count_of(int(size))} queries)"
