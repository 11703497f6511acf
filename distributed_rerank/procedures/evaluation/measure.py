"""What re-ranking was worth: metrics before and after, their difference with its interval, the ceiling, the
curve. Layer 3.

Everything here is arithmetic on rankings that exist already; where they come from is `evaluation_run`'s
business. Every number of `metrics.json` that is not a count of work done is made here, from the same
per-query values that `per_query.parquet` holds. No time and no number of workers enters: equal rankings give
equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import metrics, oml_metrics, statistics
from distributed_rerank.tensors.knn import Neighbours
from distributed_rerank.tensors.metrics import PerQuery


@dataclass(frozen=True)
class Evaluation:
    """`metrics` as they go into metrics.json, and one row for every query measured, ordered by query id."""

    metrics: dict[str, Any]
    per_query: pd.DataFrame


@dataclass(frozen=True)
class Judged:
    """The queries that have a relevant gallery item, and what is relevant to them."""

    query_items: Int64[Tensor, " query"]
    rows: Int64[Tensor, " query"]
    """Their rows in the rankings that came in."""
    labels: Int64[Tensor, " query"]
    n_relevant: Int64[Tensor, " query"]
    item_labels: Int64[Tensor, " item"]
    n_without_relevant: int

    def relevance(self, ranking: Neighbours) -> Bool[Tensor, "query k"]:
        """Whether each candidate of the judged queries is relevant."""
        return metrics.relevance(ranking.items[self.rows], self.labels, self.item_labels)


def judge(catalogue: Catalogue, query_items: Int64[Tensor, " query"]) -> Judged:
    """Count what is relevant to each query; leave out, and count, those to which nothing is."""
    labels = torch.from_numpy(catalogue.labels)
    sequences = torch.from_numpy(catalogue.sequences)
    gallery = torch.from_numpy(catalogue.gallery_items)
    n_relevant = metrics.count_relevant(
        query_items, labels[query_items], sequences[query_items], gallery, labels[gallery], sequences[gallery]
    )
    rows = n_relevant.nonzero().squeeze(1)
    kept = query_items[rows]
    return Judged(kept, rows, labels[kept], n_relevant[rows], labels, len(query_items) - len(rows))


def measure(
    catalogue: Catalogue,
    query_items: Int64[Tensor, " query"],
    before: Neighbours,
    after: Mapping[int, Neighbours],
    *,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    n_resamples: int = 2000,
) -> Evaluation:
    """Compare the first stage's ranking with the re-ranked ones.

    `before` and every ranking of `after` hold one row per query of `query_items` (ascending), in that order;
    `after` maps top_n to the ranking that re-ranks so many, the largest is the one that is reported and may
    be absent (the first stage alone). Intervals and p-values are clustered by label and seeded. Raises
    BadInput where no query has a relevant gallery item.
    """
    judged = judge(catalogue, query_items)
    if not len(judged.rows):
        raise BadInput("no query has a relevant gallery item, so nothing can be measured; check label and is_gallery")
    hits = {0: judged.relevance(before)} | {n: judged.relevance(ranking) for n, ranking in sorted(after.items())}
    values = {n: metrics.per_query(rel, judged.n_relevant, ks) for n, rel in hits.items()}
    found: dict[str, Any] = {
        "n_queries": len(judged.rows),
        "n_gallery": len(catalogue.gallery_items),
        "n_without_relevant": judged.n_without_relevant,
        "first_stage": metrics.means(values[0]),
        "oml": {"first_stage": _oml_means(judged, before, hits[0], ks)},
    }
    top_n = max(after, default=0)
    if after:
        ceiling = metrics.per_query(statistics.oracle(hits[0], top_n), judged.n_relevant, ks)
        found |= _reranked(judged, values, metrics.means(ceiling), seed, n_resamples)
        found["oml"]["reranked"] = _oml_means(judged, after[top_n], hits[top_n], ks)
    found["categories"] = _by_category(catalogue, judged, values[0], values[top_n], bool(after))
    table = _per_query_table(catalogue, judged, hits, values, top_n)
    return Evaluation(found, table)


def difference(
    before: PerQuery, after: PerQuery, labels: Int64[Tensor, " query"], seed: int, n_resamples: int
) -> dict[str, Any]:
    """`statistics.compare` clustered by label, as metrics.json spells it."""
    compared = statistics.compare(before, after, labels, seed=seed, n_resamples=n_resamples)
    spelled = {}
    for key, value in compared.items():
        fields = asdict(value)
        spelled[key] = {"ci95": [fields.pop("low"), fields.pop("high")], **fields}
    return spelled


def _reranked(
    judged: Judged, values: Mapping[int, PerQuery], ceiling: dict[str, float], seed: int, n_resamples: int
) -> dict[str, Any]:
    """Everything that exists only where something was re-ranked."""
    top_n = max(values)
    first, last = metrics.means(values[0]), metrics.means(values[top_n])
    curve = [{"top_n": n, "metrics": metrics.means(values[n])} for n in sorted(values) if n]
    stacked = torch.stack([values[n]["map@10"] for n in sorted(values) if n])
    return {
        "top_n": top_n,
        "reranked": last,
        "oracle": ceiling,
        "headroom_captured": {key: statistics.headroom_captured(first[key], last[key], ceiling[key]) for key in first},
        "difference": difference(values[0], values[top_n], judged.labels, seed, n_resamples),
        "curve": curve,
        "knee": {
            "metric": "map@10",
            "top_n": curve[statistics.knee(stacked, judged.labels, seed=seed, n_resamples=n_resamples)]["top_n"],
        },
    }


def _oml_means(judged: Judged, ranking: Neighbours, is_relevant: Tensor, ks: Sequence[int]) -> dict[str, float]:
    n_retrieved = (ranking.items[judged.rows] >= 0).sum(dim=1)
    return metrics.means(oml_metrics.per_query(is_relevant, n_retrieved, judged.n_relevant, ks))


def _by_category(
    catalogue: Catalogue, judged: Judged, before: PerQuery, after: PerQuery, is_reranked: bool
) -> dict[str, Any]:
    """Means within each category of the queries, by name; {} where the catalogue has none."""
    if catalogue.categories is None:
        return {}
    names, numbers = np.unique(catalogue.categories[judged.query_items.numpy()].astype(str), return_inverse=True)
    of_query = torch.from_numpy(numbers.astype(np.int64))
    counts = torch.bincount(of_query, minlength=len(names)).tolist()
    found: dict[str, Any] = {
        str(names[number]): {"n_queries": counts[number], "first_stage": means}
        for number, means in metrics.means_by_category(before, of_query).items()
    }
    if is_reranked:
        for number, means in metrics.means_by_category(after, of_query).items():
            found[str(names[number])]["reranked"] = means
    return found


def _per_query_table(
    catalogue: Catalogue,
    judged: Judged,
    hits: Mapping[int, Tensor],
    values: Mapping[int, PerQuery],
    top_n: int,
) -> pd.DataFrame:
    """One row per judged query: what design.md's table `per query` lists."""
    items = judged.query_items.numpy()
    names = np.asarray(catalogue.label_names, dtype=object)
    categories = catalogue.categories
    columns: dict[str, Any] = {
        "query_id": catalogue.ids[items],
        "label": names[judged.labels.numpy()].astype(str),
        "category": None if categories is None else categories[items],
        "n_relevant": judged.n_relevant.numpy(),
        "first_hit_before": _place_or_null(hits[0]),
        "first_hit_after": _place_or_null(hits[top_n]) if top_n else None,
    }
    for side, n in [("before", 0), *([("after", top_n)] if top_n else [])]:
        columns |= {f"{key}_{side}": column.numpy() for key, column in values[n].items()}
    return pd.DataFrame(columns)


def _place_or_null(is_relevant: Bool[Tensor, "query k"]) -> pd.Series:
    """Rank of the first hit from 1, null where the list holds none."""
    place = pd.Series(metrics.first_hit(is_relevant).numpy(), dtype="Int64")
    return place.mask(place == 0)
