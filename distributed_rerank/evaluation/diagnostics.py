"""Figures beyond before and after: cost, adaptive n, distances, labels to check, baselines.

Figures go into metrics.json and values of single queries into per_query.parquet. Seconds differ from run to run and go
into timings.json.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_rerank.config.evaluation import MeasureConfig
from distributed_rerank.evaluation import adaptive, baselines
from distributed_rerank.evaluation.chain_steps import measure_steps
from distributed_rerank.evaluation.embedding_metrics import embedding_metrics
from distributed_rerank.evaluation.measure import Evaluation, LabelledQueries, Wanted, count_relevant, measure_ranking
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.evaluation.ship_or_wait import labels_to_check, ship_or_wait
from distributed_rerank.evaluation.thresholds import by_probability
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.storage import artifacts
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import Ranking

SHOWN_TOP_N = 50
"""Candidates whose distances are counted where nothing was re-ranked."""
N_BINS = 30
_QUERIES_PER_COUNT = 1 << 14


@dataclass
class Diagnostics:
    """Additions to metrics.json, per_query.parquet and timings.json."""

    figures: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)


def diagnose(measured: Evaluation, sources: baselines.Sources, config: MeasureConfig) -> Diagnostics:
    """Compute all diagnostics of the rankings in `sources`, whose metrics are `measured`."""
    ranked = sources.ranked
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    top_n = measured.metrics.get("top_n", SHOWN_TOP_N)
    diagnostics = Diagnostics()
    figures, timings = diagnostics.figures, diagnostics.timings
    figures["distances"] = {"first_stage": distance_histograms(ranked.before, queries, top_n)}
    if ranked.after:
        figures["distances"]["reranked"] = distance_histograms(ranked.final, queries, top_n)
    if ranked.after:
        figures["thresholds"] = by_probability(ranked.final, queries, top_n, ranked.chain)
    figures["suspects"] = labels_to_check(ranked, queries)
    figures["ship_or_wait"] = ship_or_wait(ranked, queries, measured, figures["suspects"], config)
    figures["cost"] = total_cost(ranked.scored, sources.model)
    if ranked.after:
        figures["steps"] = measure_steps(ranked, queries, measured, figures["cost"], seed=config.resampling_seed)
    if ranked.chain.pairwise is not None and ranked.scored.logits is not None:
        _add_cost_of_pairs(diagnostics, ranked, measured.metrics, config.price_per_worker_hour, sources.folder)
        _add_adaptive(diagnostics, ranked, queries, measured, config.resampling_seed)
    if ranked.first.embeddings is not None:
        figures["embeddings"] = embedding_metrics(
            ranked.first.catalogue, ranked.first.embeddings, config.fmrs, config.pcf_variances
        )
    if config.baselines:
        start = time.perf_counter()
        results = baselines.measure_baselines(
            queries, measured.before, measured.after, sources, seed=config.resampling_seed
        )
        figures["baselines"] = results.figures
        diagnostics.columns |= baselines.columns(results)
        timings["baselines"] = results.seconds
        timings["baselines_in_all"] = round(time.perf_counter() - start, 3)
    return diagnostics


def _add_cost_of_pairs(
    diagnostics: Diagnostics, ranked: Ranked, metrics: Mapping[str, Any], price: float | None, folder: Path
) -> None:
    """The cost of each point of the curve, in counts and in seconds."""
    curve = metrics["curve"]
    top_ns = [point["top_n"] for point in curve]
    costs = cost_by_top_n(ranked.scored, diagnostics.figures["cost"], top_ns, len(ranked.catalogue))
    diagnostics.figures["curve"] = [point | cost for point, cost in zip(curve, costs, strict=True)]
    pace = read_pace(folder / "pair_distances")
    diagnostics.timings["pace"] = pace
    diagnostics.timings["curve"] = seconds_by_top_n(diagnostics.figures["curve"], pace, metrics["n_queries"], price)


def _add_adaptive(
    diagnostics: Diagnostics, ranked: Ranked, queries: LabelledQueries, measured: Evaluation, seed: int
) -> None:
    """What skipping sure queries would save, measured after the pairwise step alone."""
    assert measured.after is not None, "a pairwise step re-ranks"
    pairwise = measured.after[adaptive.METRIC]
    if ranked.chain.neighbourhood:
        assert ranked.pairwise is not None, "pairs were scored"
        pairwise = measure_ranking(queries, ranked.pairwise, Wanted((1, 10))).values[adaptive.METRIC]
        diagnostics.columns[f"{adaptive.METRIC}_{baselines.PAIRWISE}"] = pairwise.numpy()
    diagnostics.figures["adaptive"], columns = adaptive.measure_adaptive(
        ranked, queries, measured.before[adaptive.METRIC], pairwise, seed=seed
    )
    diagnostics.columns |= columns


def total_cost(scored: ScoredLists, model: PairwiseModel | None) -> dict[str, Any]:
    """Counts of the whole scoring pass. A continued run did less; the stages' manifests count what it did."""
    if model is None or scored.logits is None:
        return {"pairs": 0, "unique_images": 0}
    gflop = round(model.gflop_per_pair(), 6)
    return {
        "pairs": scored.n_pairs,
        "unique_images": scored.n_images,
        "gflop_per_pair": gflop,
        "gflop": round(gflop * scored.n_pairs, 3),
        "bytes_per_image": model.bytes_per_image,
    }


def cost_by_top_n(
    scored: ScoredLists, cost: Mapping[str, Any], top_ns: list[int], n_items: int
) -> list[dict[str, Any]]:
    """Pairs, images, GFLOP and bytes of encodings for each of the ascending `top_ns`; [] where nothing was scored.

    Images without a pair cost nothing. One pass over the lists, a slice of columns at a time.
    """
    if scored.logits is None:
        return []
    is_used = torch.zeros(n_items, dtype=torch.bool)
    n_pairs, start, costs = 0, 0, []
    for top_n in top_ns:
        # The candidates that this top_n adds to the one before, those of some queries at a time.
        for first, last in sharding.blocks(len(scored.logits), _QUERIES_PER_COUNT):
            is_pair = scored.logits[first:last, start:top_n].isfinite()
            part = scored.lists[first:last]
            n_pairs += int(is_pair.sum())
            is_used[part.items[:, start : start + is_pair.shape[1]][is_pair]] = True
            is_used[part.query_items[is_pair.any(dim=1)]] = True
        n_images = int(is_used.sum())
        gflop = round(cost["gflop_per_pair"] * n_pairs, 6)
        costs.append(
            {"pairs": n_pairs, "images": n_images, "gflop": gflop, "bytes": cost["bytes_per_image"] * n_images}
        )
        start = top_n
    return costs


def read_pace(folder: Path) -> dict[str, float] | None:
    """Seconds per image and per pair, and the number of workers, of the run that finished the scoring stage `folder`.

    A continued run has the pace of the rest that it scored. None where a run scored nothing itself, or where another
    version of this code wrote the folder.
    """
    if not (folder / artifacts.MANIFEST).is_file():
        return None
    manifest = artifacts.read_manifest(folder)
    counts, seconds = manifest.get("counts") or {}, manifest.get("seconds") or {}
    if not seconds or not counts.get("pairs_scored") or not counts.get("images_decoded"):
        return None
    return {
        "seconds_per_image": seconds["encode"] / counts["images_decoded"],
        "seconds_per_pair": seconds["score"] / counts["pairs_scored"],
        "n_workers": seconds["n_workers"],
    }


def seconds_by_top_n(
    curve: list[dict[str, Any]], pace: Mapping[str, float] | None, n_queries: int, price_per_worker_hour: float | None
) -> list[dict[str, Any]]:
    """Seconds of each point of the curve at this pace, per query and in worker-seconds; the price of 1,000 queries."""
    if pace is None:
        return []
    points = []
    for point in curve:
        seconds = point["images"] * pace["seconds_per_image"] + point["pairs"] * pace["seconds_per_pair"]
        worker_seconds = seconds * pace["n_workers"]
        timed: dict[str, Any] = {
            "top_n": point["top_n"],
            "seconds": round(seconds, 4),
            "seconds_per_query": seconds / n_queries,
            "worker_seconds": round(worker_seconds, 4),
        }
        if price_per_worker_hour is not None:
            timed["price_per_1000_queries"] = worker_seconds / 3600 * price_per_worker_hour / n_queries * 1000
        points.append(timed)
    return points


def distance_histograms(ranking: Ranking, queries: LabelledQueries, top_n: int) -> dict[str, Any]:
    """Histograms of the distances of the first `top_n` candidates, relevant ones and others counted apart.

    `edges` are those of `N_BINS` equal bins from the smallest to the largest distance. {} where all are equal.
    """
    low, high = np.inf, -np.inf
    for _, distances in _heads(ranking, queries, top_n):
        finite = distances[distances.isfinite()]
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not low < high:
        return {}
    edges = np.linspace(low, high, N_BINS + 1)
    counts = {"relevant": np.zeros(N_BINS, np.int64), "other": np.zeros(N_BINS, np.int64)}
    for is_relevant, distances in _heads(ranking, queries, top_n):
        is_listed = distances.isfinite()
        for name, is_counted in (("relevant", is_listed & is_relevant), ("other", is_listed & ~is_relevant)):
            counts[name] += np.histogram(distances[is_counted].double().numpy(), edges)[0]
    return {"top_n": top_n, "edges": edges.tolist()} | {name: column.tolist() for name, column in counts.items()}


def _heads(ranking: Ranking, queries: LabelledQueries, top_n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Relevance and distances, both [query, top_n], of the first candidates of a block of queries at a time."""
    for block in queries.blocks():
        lists = ranking[block.rows]
        items = lists.items[:, :top_n]
        labels = torch.where(items >= 0, block.item_labels[items], -1)
        yield (labels == block.labels[:, None]) & (items >= 0), lists.distances[:, :top_n]
