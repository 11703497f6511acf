"""What an evaluation finds beyond before and after: baselines, cost, adaptive n, distances, suspect labels. Layer 3.

Figures go into metrics.json, values of single queries into per_query.parquet, and seconds, which differ from run to
run, into timings.json.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from distributed_rerank.config.evaluation import MeasureConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.evaluation import adaptive, baselines, cost, distances
from distributed_rerank.evaluation.measure import LabelledQueries, count_relevant, difference_to_json, measure_ranking
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.executors import Executors
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.metrics import PerQuery

SHOWN_TOP_N = 50
"""Candidates whose distances are counted where nothing was re-ranked."""


@dataclass
class Diagnostics:
    """Additions to metrics.json, per_query.parquet and timings.json."""

    figures: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)


def diagnose(
    ranked: Ranked,
    measured: dict[str, Any],
    per_query: pd.DataFrame,
    n_items: int,
    config: MeasureConfig,
    work: WorkConfig,
    model: PairwiseModel | None,
    folder: Path,
    executors: Executors,
) -> Diagnostics:
    """Everything that is found from the rankings, beside what `measure` says. `measured` is its metrics; its curve gets
    the cost of each point."""
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    found = Diagnostics()
    before = _values(per_query, "before")
    after = _values(per_query, "after") if ranked.after else None
    top_n = measured.get("top_n", SHOWN_TOP_N)
    found.figures["distances"] = {"first_stage": distances.separation(ranked.before, queries, top_n)}
    if ranked.after:
        found.figures["distances"]["reranked"] = distances.separation(ranked.final, queries, top_n)
    found.figures["suspects"] = distances.suspects(ranked)
    if after is not None:
        found.figures["categories"] = _compared(
            measured["categories"], per_query, queries, before, after, config.resampling_seed
        )
    found.figures["cost"] = cost.total_cost(ranked.scored, model)
    if ranked.chain.pairwise is not None and ranked.scored.logits is not None:
        assert after is not None, "a pairwise step re-ranks"
        _look_at_pairs(found, ranked, queries, measured, before, after, config, folder)
    if config.baselines:
        start = time.perf_counter()
        compared = baselines.measure_baselines(
            ranked,
            queries,
            before,
            after,
            config.resampling_seed,
            baselines.Sources(ranked, model, n_items, work, folder, executors),
        )
        found.figures["baselines"] = compared.figures
        found.columns |= baselines.columns(compared)
        found.timings["baselines"] = compared.seconds
        found.timings["baselines_in_all"] = round(time.perf_counter() - start, 3)
    return found


def _compared(
    categories: dict[str, Any],
    per_query: pd.DataFrame,
    queries: LabelledQueries,
    before: PerQuery,
    after: PerQuery,
    seed: int,
) -> dict[str, Any]:
    """The categories with the paired difference within each, clustered by label."""
    if not categories:
        return categories
    names, numbers = np.unique(per_query["category"].astype(str).to_numpy(str), return_inverse=True)
    of_query = torch.from_numpy(numbers.astype(np.int64))
    found = statistics.compare_by_category(before, after, queries.labels, of_query, seed=seed)
    differences = {str(names[number]): found[number] for number in found}
    return {
        name: part | {"difference": {key: difference_to_json(value) for key, value in differences[name].items()}}
        for name, part in categories.items()
    }


def _look_at_pairs(
    found: Diagnostics,
    ranked: Ranked,
    queries: LabelledQueries,
    measured: dict[str, Any],
    before: PerQuery,
    after: PerQuery,
    config: MeasureConfig,
    folder: Path,
) -> None:
    """What scored pairs cost, and how many of them could be saved."""
    curve = measured["curve"]
    top_ns = [point["top_n"] for point in curve]
    counted = cost.cost_of_each(ranked.scored, found.figures["cost"], top_ns, len(ranked.catalogue))
    found.figures["curve"] = [point | more for point, more in zip(curve, counted, strict=True)]
    pace = cost.read_pace(folder / "pair_distances")
    found.timings["pace"] = pace
    found.timings["curve"] = cost.seconds_of_each(
        found.figures["curve"], pace, measured["n_queries"], config.price_per_worker_hour
    )
    pairwise = after[adaptive.METRIC]
    if ranked.chain.neighbourhood:
        pairwise = _pairwise_values(ranked, queries)
        found.columns[f"{adaptive.METRIC}_{baselines.PAIRWISE}"] = pairwise.numpy()
    found.figures["adaptive"], columns = adaptive.measure_adaptive(
        ranked, queries, before[adaptive.METRIC], pairwise, seed=config.resampling_seed
    )
    found.columns |= columns


def _pairwise_values(ranked: Ranked, queries: LabelledQueries) -> Tensor:
    """The metric of the labelled queries after the pairwise step alone."""
    assert ranked.pairwise is not None, "pairs were scored"
    return measure_ranking(queries, ranked.pairwise, (1, 10)).values[adaptive.METRIC]


def _values(per_query: pd.DataFrame, side: str) -> PerQuery:
    """The metrics that baselines are compared by, of the labelled queries."""
    keys = [key for key in baselines.KEYS if f"{key}_{side}" in per_query]
    return {key: torch.from_numpy(per_query[f"{key}_{side}"].to_numpy(np.float64).copy()) for key in keys}
