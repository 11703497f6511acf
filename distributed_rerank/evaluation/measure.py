"""What re-ranking was worth: metrics before and after, their difference with its interval, the ceiling, the
curve. Layer 3.

Everything here is arithmetic on rankings that exist already; where they come from is `evaluation_run`'s
business. Every number of `metrics.json` that is not a count of work done is made here, from the same
per-query values that `per_query.parquet` holds. No time and no number of workers enters: equal rankings give
equal bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import metrics, oml_metrics, statistics
from distributed_rerank.tensors.knn import Ranking
from distributed_rerank.tensors.metrics import PerQuery

Key = TypeVar("Key")

QUERIES_PER_BLOCK = 1 << 13


@dataclass(frozen=True)
class Evaluation:
    """`metrics` as they go into metrics.json, and one row for every query measured, ordered by query id."""

    metrics: dict[str, Any]
    per_query: pd.DataFrame


@dataclass(frozen=True)
class LabelledQueries:
    """The queries that have a relevant gallery item, and what is relevant to them."""

    query_items: Int64[Tensor, " query"]
    rows: Int64[Tensor, " query"]
    """Their rows in the rankings that came in."""
    labels: Int64[Tensor, " query"]
    n_relevant: Int64[Tensor, " query"]
    item_labels: Int64[Tensor, " item"]
    n_without_relevant: int

    def blocks(self) -> Iterator["LabelledQueries"]:
        """The same in blocks of queries."""
        for rows in torch.arange(len(self.rows)).split(QUERIES_PER_BLOCK):
            yield replace(
                self,
                query_items=self.query_items[rows],
                rows=self.rows[rows],
                labels=self.labels[rows],
                n_relevant=self.n_relevant[rows],
            )

    def relevance(self, ranking: Ranking) -> Bool[Tensor, "query k"]:
        """Whether each candidate of the labelled queries is relevant."""
        return metrics.relevance(ranking[self.rows].items, self.labels, self.item_labels)


@dataclass(frozen=True)
class Measured:
    """One ranking of the labelled queries, measured."""

    values: PerQuery
    first_hit: Int64[Tensor, " query"]
    """Place of the first relevant candidate from 1; 0 where there is none."""
    oml: dict[str, float]
    """Means by OML's definitions."""

    @property
    def means(self) -> dict[str, float]:
        """Means over the queries."""
        return metrics.means(self.values)


def count_relevant(catalogue: Catalogue, query_items: Int64[Tensor, " query"]) -> LabelledQueries:
    """Count what is relevant to each query; leave out, and count, those to which nothing is."""
    labels = torch.from_numpy(catalogue.labels)
    sequences = torch.from_numpy(catalogue.sequences)
    gallery = torch.from_numpy(catalogue.gallery_items)
    n_relevant = metrics.count_relevant(
        query_items, labels[query_items], sequences[query_items], gallery, labels[gallery], sequences[gallery]
    )
    rows = n_relevant.nonzero().squeeze(1)
    kept = query_items[rows]
    return LabelledQueries(kept, rows, labels[kept], n_relevant[rows], labels, len(query_items) - len(rows))


def measure(
    catalogue: Catalogue,
    query_items: Int64[Tensor, " query"],
    before: Ranking,
    after: Mapping[int, Ranking],
    *,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    n_resamples: int = 2000,
) -> Evaluation:
    """Compare the first stage's ranking with the re-ranked ones.

    `before` and every ranking of `after` have one row per query of `query_items` (ascending), in that order;
    `after` maps top_n to the ranking that re-ranks so many, the largest is the one that is reported and may
    be absent (the first stage alone). Rankings are asked for one block of queries at a time. Intervals and
    p-values are clustered by label and seeded. Raises BadInput where no query has a relevant gallery item.
    """
    queries = count_relevant(catalogue, query_items)
    if not len(queries.rows):
        raise BadInput("no query has a relevant gallery item, so nothing can be measured; check label and is_gallery")
    first = measure_ranking(queries, before, ks)
    found: dict[str, Any] = {
        "n_queries": len(queries.rows),
        "n_gallery": len(catalogue.gallery_items),
        "n_without_relevant": queries.n_without_relevant,
        "first_stage": first.means,
        "oml": {"first_stage": first.oml},
    }
    last = measure_ranking(queries, after[max(after)], ks) if after else None
    if last is not None:
        found |= _reranked(queries, before, after, first, last, ks, seed, n_resamples)
        found["oml"]["reranked"] = last.oml
    found["categories"] = _by_category(catalogue, queries, first, last)
    return Evaluation(found, _per_query_table(catalogue, queries, first, last))


def measure_ranking(queries: LabelledQueries, ranking: Ranking, ks: Sequence[int]) -> Measured:
    """Every metric of every labelled query, a block of queries at a time."""

    def measure_block(block: LabelledQueries) -> dict[tuple[str, str], Tensor]:
        items = ranking[block.rows].items
        is_relevant = metrics.relevance(items, block.labels, block.item_labels)
        values = metrics.per_query(is_relevant, block.n_relevant, ks)
        oml = oml_metrics.per_query(is_relevant, (items >= 0).sum(dim=1), block.n_relevant, ks)
        named = {("value", key): column for key, column in values.items()}
        named |= {("oml", key): column for key, column in oml.items()}
        return named | {("place", "first"): metrics.first_hit(is_relevant)}

    found = _of_all_blocks(queries, measure_block)
    values, oml = ({key: column for (kind, key), column in found.items() if kind == of} for of in ("value", "oml"))
    return Measured(values, found["place", "first"], metrics.means(oml))


def _of_all_blocks(
    queries: LabelledQueries, measure_block: Callable[[LabelledQueries], Mapping[Key, Tensor]]
) -> dict[Key, Tensor]:
    """What `measure_block` finds of each query, for all queries.

    Written into columns that exist from the first block on: kept parts would break up the memory that the next blocks
    work in, and the process would grow to several times what it holds.
    """
    columns: dict[Key, Tensor] = {}
    start = 0
    for block in queries.blocks():
        stop = start + len(block.rows)
        for key, part in measure_block(block).items():
            if key not in columns:
                columns[key] = torch.empty(len(queries.rows), dtype=part.dtype)
            columns[key][start:stop] = part
        start = stop
    return columns


def difference(
    before: PerQuery, after: PerQuery, labels: Int64[Tensor, " query"], seed: int, n_resamples: int
) -> dict[str, Any]:
    """`statistics.compare` clustered by label, as metrics.json spells it."""
    compared = statistics.compare(before, after, labels, seed=seed, n_resamples=n_resamples)
    return {key: difference_to_json(value) for key, value in compared.items()}


def difference_to_json(difference: statistics.Difference) -> dict[str, Any]:
    """A difference as metrics.json spells it."""
    fields = asdict(difference)
    return {"ci95": [fields.pop("low"), fields.pop("high")], **fields}


def _reranked(
    queries: LabelledQueries,
    before: Ranking,
    after: Mapping[int, Ranking],
    first: Measured,
    last: Measured,
    ks: Sequence[int],
    seed: int,
    n_resamples: int,
) -> dict[str, Any]:
    """Everything that exists only where something was re-ranked."""
    top_n = max(after)
    curve, points = [], []
    for n in sorted(after):
        measured = last if n == top_n else measure_ranking(queries, after[n], ks)
        curve.append({"top_n": n, "metrics": measured.means})
        points.append(measured.values["map@10"])
    knee = statistics.knee(torch.stack(points), queries.labels, seed=seed, n_resamples=n_resamples)
    start, end, ceiling = first.means, last.means, _ceiling(queries, before, top_n, ks)
    return {
        "top_n": top_n,
        "reranked": end,
        "oracle": ceiling,
        "headroom_captured": {key: statistics.headroom_captured(start[key], end[key], ceiling[key]) for key in start},
        "difference": difference(first.values, last.values, queries.labels, seed, n_resamples),
        "curve": curve,
        "knee": {"metric": "map@10", "top_n": curve[knee]["top_n"]},
    }


def _ceiling(queries: LabelledQueries, before: Ranking, top_n: int, ks: Sequence[int]) -> dict[str, float]:
    """Means of what a perfect re-ranker of the first `top_n` reaches."""
    return metrics.means(
        _of_all_blocks(
            queries,
            lambda block: metrics.per_query(statistics.oracle(block.relevance(before), top_n), block.n_relevant, ks),
        )
    )


def _by_category(
    catalogue: Catalogue, queries: LabelledQueries, first: Measured, last: Measured | None
) -> dict[str, Any]:
    """Means within each category of the queries, by name; {} where the catalogue has none."""
    if catalogue.categories is None:
        return {}
    names, numbers = np.unique(catalogue.categories[queries.query_items.numpy()].astype(str), return_inverse=True)
    of_query = torch.from_numpy(numbers.astype(np.int64))
    counts = torch.bincount(of_query, minlength=len(names)).tolist()
    found: dict[str, Any] = {
        str(names[number]): {"n_queries": counts[number], "first_stage": means}
        for number, means in metrics.means_by_category(first.values, of_query).items()
    }
    if last is not None:
        for number, means in metrics.means_by_category(last.values, of_query).items():
            found[str(names[number])]["reranked"] = means
    return found


def _per_query_table(
    catalogue: Catalogue, queries: LabelledQueries, first: Measured, last: Measured | None
) -> pd.DataFrame:
    """One row per labelled query: what design.md's table `per query` lists."""
    items = queries.query_items.numpy()
    names = np.asarray(catalogue.label_names, dtype=object)
    categories = catalogue.categories
    columns: dict[str, Any] = {
        "query_id": catalogue.ids[items],
        "label": names[queries.labels.numpy()].astype(str),
        "category": None if categories is None else categories[items],
        "n_relevant": queries.n_relevant.numpy(),
        "first_hit_before": _place_or_null(first),
        "first_hit_after": None if last is None else _place_or_null(last),
    }
    for side, measured in (("before", first), ("after", last)):
        if measured is not None:
            columns |= {f"{key}_{side}": column.numpy() for key, column in measured.values.items()}
    return pd.DataFrame(columns)


def _place_or_null(measured: Measured) -> pd.Series:
    """Rank of the first hit from 1, null where the list holds none."""
    place = pd.Series(measured.first_hit.numpy(), dtype="Int64")
    return place.mask(place == 0)
