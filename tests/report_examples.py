"""Made-up values of queries and the metrics of an evaluation, for the tests of the report."""

from typing import Any

import numpy as np
import pandas as pd

MEANS = ("cmc@1", "map@10")


def made_up_queries(n_queries: int, seed: int = 0) -> pd.DataFrame:
    """Per-query values with one relevant item a query, so that mAP@10 is the reciprocal rank up to 10."""
    rng = np.random.default_rng(seed)
    before, after = (pd.Series(rng.integers(1, 16, n_queries), dtype="Int64") for _ in range(2))
    before, after = before.mask(before > 14), after.mask(after > 14)
    table = {
        "query_id": [f"q{number:06d}" for number in range(n_queries)],
        "label": [f"label <{number % 7}>" for number in range(n_queries)],
        "category": [f"kind {number % 3}" for number in range(n_queries)],
        "n_relevant": 1,
        "first_hit_before": before,
        "first_hit_after": after,
    }
    for side, ranks in (("before", before), ("after", after)):
        places = ranks.astype("Float64").to_numpy(dtype=float, na_value=np.inf)
        table[f"cmc@1_{side}"] = (places <= 1).astype(float)
        table[f"map@10_{side}"] = np.where(places <= 10, 1 / places, 0.0)
    return pd.DataFrame(table)


THRESHOLDS = [
    {
        "probability": 0.1,
        "n_accepted": 200,
        "precision": 0.25,
        "recall": 0.8,
        "n_answered": 40,
        "right_first": 0.5,
    },
    {
        "probability": 0.9,
        "n_accepted": 10,
        "precision": None,
        "recall": 0.0,
        "n_answered": 0,
        "right_first": None,
    },
]
SUSPECT = {
    "precision": 0.25,
    "query_id": "image <0>",
    "query_label": "this",
    "gallery_id": "image 1",
    "gallery_label": "that",
    "distance": 0.125,
    "rank": 2,
}
TIMINGS = {
    "curve": [
        {"top_n": n, "seconds": 2.0 * n, "seconds_per_query": 0.05 * n, "worker_seconds": 4.0 * n,
         "price_per_1000_queries": 0.25 * n}
        for n in (5, 20, 50)
    ],
    "baselines": {"k_reciprocal": 1.25},
    "score": 12.5,
}  # fmt: skip


def baselines_of(last: dict[str, float], against: float = -0.1) -> dict[str, Any]:
    """One that was measured, one that follows the pairwise step, one that was not run."""
    change = {"mean": 0.05, "ci95": [0.02, 0.08]}
    compared = {"mean": against, "ci95": [against - 0.01, against + 0.01]}
    figures = {"metrics": last, "difference": {"map@10": change}, "against_reranked": {"map@10": compared}}
    return {
        "k_reciprocal": {"after": "first_stage", "constants": {"k1": 20, "weight": 0.3}, **figures},
        "pairwise+query_expansion": {"after": "pairwise", "constants": {"k": 5}, **figures},
        "database_augmentation": {"after": "first_stage", "constants": {"k": 5}, "skipped": "it needs <embeddings>"},
    }


def category_of(group: pd.DataFrame) -> dict[str, Any]:
    """Means and difference of the queries of one category."""
    first, last = ({key: float(group[f"{key}_{side}"].mean()) for key in MEANS} for side in ("before", "after"))
    change = {"mean": last["map@10"] - first["map@10"], "ci95": [-0.3, 0.4], "n_clusters": 7}
    counts = {"n_better": 1, "n_worse": 2, "n_equal": len(group) - 3}
    difference = {"map@10": change | counts}
    return {"n_queries": len(group), "first_stage": first, "reranked": last, "difference": difference}


def adaptive_of(first: dict[str, float], last: dict[str, float]) -> dict[str, Any]:
    """What skipping sure queries saves."""
    return {
        "metric": "map@10",
        "kept_gain": 0.95,
        "chosen_on": "the other half",
        "thresholds": [{"signal": "gap", "threshold": 0.5}, {"signal": "spread", "threshold": None}],
        "n_skipped": 10,
        "pairs": 500,
        "pairs_saved": 125,
        "first_stage": first["map@10"],
        "reranked": last["map@10"],
        "adaptive": last["map@10"] - 0.004,
        "difference": {"mean": -0.004, "ci95": [-0.009, 0.001]},
        "curve": {"gap": [{"share": share / 4, "map@10": 0.5 - 0.1 * share} for share in range(5)]},
    }


def metrics_of(per_query: pd.DataFrame) -> dict[str, Any]:
    """metrics.json of these queries, as far as the report reads it."""
    first = {key: float(per_query[f"{key}_before"].mean()) for key in MEANS}
    last = {key: float(per_query[f"{key}_after"].mean()) for key in MEANS}
    differences = {
        key: {
            "mean": last[key] - first[key],
            "ci95": [-0.02, 0.04],
            "p_value": 0.4,
            "n_better": 3,
            "n_worse": 2,
        }
        for key in MEANS
    }
    return {
        "n_queries": len(per_query),
        "n_gallery": 1234,
        "n_without_relevant": 5,
        "n_rejected": 1,
        "first_stage": first,
        "reranked": last,
        "oracle": {key: 0.9876 for key in MEANS},
        "difference": differences,
        "curve": [
            {"top_n": n, "pairs": 10 * n, "images": 60, "gflop": 0.5 * n, "bytes": 6000, "metrics": last}
            for n in (5, 20, 50)
        ],
        "knee": {"metric": "map@10", "top_n": 20},
        "top_n": 50,
        "baselines": baselines_of(last),
        "steps": [
            {"step": "pairwise", "metrics": last, "difference": differences, "pairs": 500, "bytes_per_image": 6000}
        ],
        "adaptive": adaptive_of(first, last),
        "distances": {
            "first_stage": {"top_n": 50, "edges": [0, 0.5, 1], "relevant": [30, 10], "other": [10, 90]},
            "reranked": {"top_n": 50, "edges": [-1, 0, 1], "relevant": [40, 0], "other": [0, 100]},
        },
        "thresholds": THRESHOLDS,
        "suspects": [SUSPECT],
        "oml": {"first_stage": first, "reranked": last},
        "cost": {"pairs": 500, "gflop_per_pair": 0.25},
        "categories": {str(name): category_of(group) for name, group in per_query.groupby("category")},
    }
