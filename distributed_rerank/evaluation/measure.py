"""Metrics before and after re-ranking: their difference with its interval, the ceiling, the curve over top_n.

Everything here is arithmetic on rankings. The figures in metrics.json come from the same values of each query that
per_query.parquet holds. Time and number of workers never enter, so equal rankings give equal bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.relevance import count_judged, judged_pairs
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import columns, metrics, oml_metrics, statistics
from distributed_rerank.tensors.candidate_lists import Ranking
from distributed_rerank.tensors.metrics import PerQuery
from distributed_rerank.tensors.pair_values import PairValues

Key = TypeVar("Key")
OwnMetric = Callable[[Bool[Tensor, "query k"], Int64[Tensor, " query"]], Tensor]
"""A metric of the user's: relevance in list order and numbers of relevant items to one value a query."""

QUERIES_PER_BLOCK = 1 << 13
_GALLERY_PER_BLOCK = 1 << 16
"""Items whose gallery items are counted at a time, as long as they are more than the queries."""
COMPARED = ("cmc@1", "map@10")
"""Metrics by which categories and baselines are compared, as far as they are measured."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of metrics.json, and one row for every query measured, ordered by query id."""

    metrics: dict[str, Any]
    per_query: pd.DataFrame
    before: PerQuery
    """`COMPARED` metrics of the first stage."""
    after: PerQuery | None
    """The same after re-ranking; None where the first stage alone is measured."""


@dataclass(frozen=True)
class LabelledQueries:
    """The queries that have a relevant gallery item, with their labels and numbers of relevant items."""

    query_items: Int64[Tensor, " query"]
    rows: Int64[Tensor, " query"]
    """Their rows in the rankings of all queries."""
    labels: Int64[Tensor, " query"]
    n_relevant: Int64[Tensor, " query"]
    item_labels: Int32[Tensor, " item"]
    judged: PairValues | None
    """Grades that say what is relevant, in place of the labels."""
    rows_without: Int64[Tensor, " other"]
    """Rows of the queries without a relevant item. OML counts them, and nobody else does."""

    @property
    def n_without_relevant(self) -> int:
        """How many queries have no relevant item."""
        return len(self.rows_without)

    def blocks(self) -> Iterator["LabelledQueries"]:
        """The queries in blocks of `QUERIES_PER_BLOCK`."""
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
        items = ranking[self.rows].items
        if self.judged is not None:
            return self.judged.look_up(self.query_items[:, None].expand_as(items), items) > 0
        return metrics.relevance(items, self.labels, self.item_labels)


@dataclass(frozen=True)
class Measured:
    """The metrics of one ranking of the labelled queries."""

    values: PerQuery
    first_hit: Int64[Tensor, " query"]
    """Rank of the first relevant candidate from 1; 0 where the list holds none."""
    oml: dict[str, float]
    """Means by open-metric-learning's definitions."""

    @property
    def means(self) -> dict[str, float]:
        """Mean of each metric over the queries."""
        return metrics.means(self.values)

    @property
    def compared(self) -> PerQuery:
        """The `COMPARED` metrics of every query."""
        return {key: self.values[key] for key in COMPARED if key in self.values}


@dataclass(frozen=True)
class Wanted:
    """The metrics to measure: cut-offs, and metrics of the user's by name."""

    ks: Sequence[int] = (1, 5, 10)
    own: Mapping[str, OwnMetric] = field(default_factory=dict)

    def per_query(self, is_relevant: Bool[Tensor, "query k"], n_relevant: Int64[Tensor, " query"]) -> PerQuery:
        """Every metric of every query. Raises BadInput where one of the user's is not one finite number a query."""
        values = metrics.per_query(is_relevant, n_relevant, self.ks)
        for name, metric in self.own.items():
            found = torch.as_tensor(metric(is_relevant, n_relevant)).double()
            if found.shape != n_relevant.shape or not bool(found.isfinite().all()):
                shape = tuple(found.shape)
                raise BadInput(f"the metric {name} must give one finite number for each query; {shape} or NaN came")
            values[name] = found
        return values


def count_relevant(catalogue: Catalogue, query_items: Int64[Tensor, " query"]) -> LabelledQueries:
    """Count relevant gallery items per query. Queries with none are dropped and counted."""
    labels, sequences = tensor_of(catalogue.labels), tensor_of(catalogue.sequences)
    judged = judged_pairs(catalogue)
    if judged is not None:
        n_relevant = torch.from_numpy(count_judged(catalogue))[query_items]
    else:
        own = query_items, labels[query_items].long(), sequences[query_items].long()
        # The gallery some items at a time: sorting it at once would need many times its memory.
        n_relevant = torch.zeros_like(query_items)
        for items in catalogue.gallery_blocks(max(_GALLERY_PER_BLOCK, len(query_items))):
            part = torch.from_numpy(items)
            n_relevant += metrics.count_relevant(*own, part, labels[part].long(), sequences[part].long())
    rows, without = n_relevant.nonzero().squeeze(1), (n_relevant == 0).nonzero().squeeze(1)
    kept = query_items[rows]
    return LabelledQueries(kept, rows, labels[kept].long(), n_relevant[rows], labels, judged, without)


def measure(
    catalogue: Catalogue,
    query_items: Int64[Tensor, " query"],
    before: Ranking,
    after: Mapping[int, Ranking],
    *,
    ks: Sequence[int] = (1, 5, 10),
    own: Mapping[str, OwnMetric] | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    searched: Ranking | None = None,
) -> Evaluation:
    """Compare the first stage's ranking with the re-ranked ones.

    `searched` holds the candidates that are re-ranked, where they are not those of `before`: the ceiling is theirs.

    `before` and every ranking of `after` have one row per query of `query_items` (ascending), in that order. `after`
    maps top_n to the ranking that re-ranks so many candidates: the largest is reported, the others are points of the
    curve, and without any the first stage alone is measured. Rankings are read one block of queries at a time.
    Intervals and p-values are clustered by label and seeded. Raises BadInput where no query has a relevant item,
    and where a metric of `own` is not one finite number a query.
    """
    queries = count_relevant(catalogue, query_items)
    if not len(queries.rows):
        raise BadInput("no query has a relevant gallery item, so nothing can be measured; check label and is_gallery")
    wanted = Wanted(ks, own or {})
    first = measure_ranking(queries, before, wanted)
    resampling = {"seed": seed, "n_resamples": n_resamples}
    figures: dict[str, Any] = {
        "n_queries": len(queries.rows),
        "n_gallery": catalogue.n_gallery,
        "n_without_relevant": queries.n_without_relevant,
        "first_stage": first.means,
        "oml": {"first_stage": first.oml},
    }
    last = measure_ranking(queries, after[max(after)], wanted) if after else None
    if last is not None:
        figures |= _reranked(queries, searched or before, after, first, last, wanted, resampling)
        if searched is not None:
            figures["oracle_first_stage"] = _ceiling(queries, before, max(after), wanted)
        figures["oml"]["reranked"] = last.oml
    figures["categories"] = _by_category(catalogue, queries, first, last, resampling)
    table = _per_query_table(catalogue, queries, first, last)
    return Evaluation(figures, table, first.compared, None if last is None else last.compared)


def measure_ranking(queries: LabelledQueries, ranking: Ranking, wanted: Wanted) -> Measured:
    """Every metric of every labelled query, computed in blocks of queries."""

    def measure_block(block: LabelledQueries) -> dict[tuple[str, str], Tensor]:
        items = ranking[block.rows].items
        is_relevant = metrics.relevance(items, block.labels, block.item_labels)
        values = wanted.per_query(is_relevant, block.n_relevant)
        oml = oml_metrics.per_query(is_relevant, (items >= 0).sum(dim=1), block.n_relevant, wanted.ks)
        named = {("value", key): column for key, column in values.items()}
        named |= {("oml", key): column for key, column in oml.items()}
        return named | {("rank", "first_hit"): metrics.first_hit(is_relevant)}

    measured = of_all_blocks(queries, measure_block)
    values, oml = ({key: column for (kind, key), column in measured.items() if kind == of} for of in ("value", "oml"))
    return Measured(values, measured["rank", "first_hit"], _oml_means(oml, queries, ranking))


def _oml_means(values: PerQuery, queries: LabelledQueries, ranking: Ranking) -> dict[str, float]:
    """Means over all queries. One without a relevant item has 1 where its list is empty too, as in OML, and else 0."""
    n_void = 0
    for rows in queries.rows_without.split(QUERIES_PER_BLOCK):
        n_void += int((ranking[rows].items < 0).all(dim=1).sum())
    n_queries = len(queries.rows) + queries.n_without_relevant
    n_labelled = len(queries.rows)
    return {key: (mean * n_labelled + n_void) / n_queries for key, mean in metrics.means(values).items()}


def of_all_blocks(
    queries: LabelledQueries, measure_block: Callable[[LabelledQueries], Mapping[Key, Tensor]]
) -> dict[Key, Tensor]:
    """The columns that `measure_block` returns for a block, joined over all queries."""
    return columns.join(len(queries.rows), map(measure_block, queries.blocks()))


def _reranked(
    queries: LabelledQueries,
    searched: Ranking,
    after: Mapping[int, Ranking],
    first: Measured,
    last: Measured,
    wanted: Wanted,
    resampling: dict[str, int],
) -> dict[str, Any]:
    """The part of metrics.json that compares the re-ranked order with the first stage's."""
    top_n = max(after)
    curve, points = [], []
    for n in sorted(after):
        measured = last if n == top_n else measure_ranking(queries, after[n], wanted)
        curve.append({"top_n": n, "metrics": measured.means})
        points.append(measured.values["map@10"])
    knee = statistics.knee(torch.stack(points), queries.labels, **resampling)
    start, end, ceiling = first.means, last.means, _ceiling(queries, searched, top_n, wanted)
    return {
        "top_n": top_n,
        "reranked": end,
        "oracle": ceiling,
        "headroom_captured": {key: statistics.headroom_captured(start[key], end[key], ceiling[key]) for key in start},
        "difference": statistics.compare_to_json(first.values, last.values, queries.labels, **resampling),
        "curve": curve,
        "knee": {"metric": "map@10", "top_n": curve[knee]["top_n"]},
    }


def _ceiling(queries: LabelledQueries, before: Ranking, top_n: int, wanted: Wanted) -> dict[str, float]:
    """Mean metrics of a perfect re-ranker of the first `top_n` candidates."""
    return metrics.means(
        of_all_blocks(
            queries,
            lambda block: wanted.per_query(statistics.oracle(block.relevance(before), top_n), block.n_relevant),
        )
    )


def _by_category(
    catalogue: Catalogue, queries: LabelledQueries, first: Measured, last: Measured | None, resampling: dict[str, int]
) -> dict[str, Any]:
    """Means and paired differences within each category of the queries, by its name; {} without categories."""
    if catalogue.categories is None:
        return {}
    codes, numbers = np.unique(catalogue.categories[queries.query_items.numpy()], return_inverse=True)
    names, category = catalogue.category_names[codes], torch.from_numpy(numbers.astype(np.int64))
    counts = torch.bincount(category, minlength=len(names)).tolist()
    by_name: dict[str, Any] = {
        str(names[number]): {"n_queries": counts[number], "first_stage": means}
        for number, means in metrics.means_by_category(first.values, category).items()
    }
    if last is None:
        return by_name
    differences = statistics.compare_by_category(first.compared, last.compared, queries.labels, category, **resampling)
    for number, means in metrics.means_by_category(last.values, category).items():
        compared = {key: statistics.difference_to_json(value) for key, value in differences[number].items()}
        by_name[str(names[number])] |= {"reranked": means, "difference": compared}
    return by_name


def _per_query_table(
    catalogue: Catalogue, queries: LabelledQueries, first: Measured, last: Measured | None
) -> pd.DataFrame:
    """The table per_query.parquet: one row per labelled query."""
    items = queries.query_items.numpy()
    categories = catalogue.categories
    table: dict[str, Any] = {
        "query_id": catalogue.ids[items],
        "label": catalogue.label_names[queries.labels.numpy()].astype(str),
        "category": None if categories is None else catalogue.category_names[categories[items]],
        "n_relevant": queries.n_relevant.numpy(),
        "first_hit_before": _rank_or_null(first),
        "first_hit_after": None if last is None else _rank_or_null(last),
    }
    for side, measured in (("before", first), ("after", last)):
        if measured is not None:
            table |= {f"{key}_{side}": column.numpy() for key, column in measured.values.items()}
    return pd.DataFrame(table)


def _rank_or_null(measured: Measured) -> pd.Series:
    """Rank of the first relevant candidate from 1, null where the list holds none."""
    ranks = pd.Series(measured.first_hit.numpy(), dtype="Int64")
    return ranks.mask(ranks == 0)
