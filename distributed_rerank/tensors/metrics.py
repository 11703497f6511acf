"""Textbook retrieval metrics, one value per query, and their means.

Everything is computed per query first (so that queries can be compared, grouped and resampled) and averaged last. The
definitions are the usual ones of information retrieval; OML's, which differ, are in `oml_metrics`. A list may be short:
its missing places are -1 and count as irrelevant. Each row is reduced by running sums along the list, so a value does
not depend on how the queries were cut into blocks.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float64, Int, Int64
from torch import Tensor
from torch.nn import functional

from distributed_rerank.errors import BadInput

PerQuery = dict[str, Float64[Tensor, " query"]]
"""Metric key -> one float64 per query."""
_Keys = tuple[Int64[Tensor, " query"], Int64[Tensor, " gallery"]]


def relevance(
    candidate_items: Int[Tensor, "query k"],
    query_labels: Int64[Tensor, " query"],
    item_labels: Int[Tensor, " item"],
) -> Bool[Tensor, "query k"]:
    """Whether each candidate has the label of its query; never for missing candidates or without labels (-1)."""
    is_there = candidate_items >= 0
    labels = item_labels[candidate_items.clamp(min=0)]
    return is_there & (labels == query_labels[:, None]) & (labels >= 0)


def count_relevant(
    query_items: Int64[Tensor, " query"],
    query_labels: Int64[Tensor, " query"],
    query_sequences: Int64[Tensor, " query"] | None,
    gallery_items: Int64[Tensor, " gallery"],
    gallery_labels: Int64[Tensor, " gallery"],
    gallery_sequences: Int64[Tensor, " gallery"] | None,
) -> Int64[Tensor, " query"]:
    """How many gallery items are relevant to each query, without itself and without its own sequence.

    Sequence -1 (or None for all) is no sequence; a query of label -1 has no relevant items. By inclusion and exclusion
    on sorted keys: O((query + gallery) log gallery) time and linear memory, never a query x gallery matrix.
    """
    # [query]: gallery items of the query's label, less the query itself.
    label = query_labels, gallery_labels
    with_item = _join(label, (query_items, gallery_items))
    n_relevant = _count_equal(*label) - _count_equal(*with_item)
    if query_sequences is not None and gallery_sequences is not None:
        # Less those of the query's label and sequence, but not the query itself, which is subtracted already.
        sequence = query_sequences, gallery_sequences
        in_sequence = _count_equal(*_join(label, sequence)) - _count_equal(*_join(with_item, sequence))
        n_relevant = n_relevant - torch.where(query_sequences >= 0, in_sequence, 0)
    return torch.where(query_labels >= 0, n_relevant, 0)


def first_hit(is_relevant: Bool[Tensor, "query k"]) -> Int64[Tensor, " query"]:
    """Place of the first relevant candidate, counted from 1; 0 where the list holds none."""
    if is_relevant.shape[1] == 0:
        return torch.zeros(len(is_relevant), dtype=torch.int64, device=is_relevant.device)
    place = is_relevant.to(torch.uint8).argmax(dim=1) + 1
    return torch.where(is_relevant.any(dim=1), place, 0)


def per_query(
    is_relevant: Bool[Tensor, "query k"],
    n_relevant: Int64[Tensor, " query"],
    ks: Sequence[int] = (1, 5, 10),
) -> PerQuery:
    """Every metric of every query, for each cut-off k of `ks`, best candidate first.

    With rel(i) = 1 where the i-th candidate is relevant, hits(k) = sum_{i<=k} rel(i), P(i) = hits(i) / i and R =
    `n_relevant`:

    - `cmc@k` = [hits(k) > 0], also known as hit rate, success@k or (in metric learning) "recall@k";
    - `precision@k` = hits(k) / k;  `recall@k` = hits(k) / R;
    - `map@k` = (1 / min(k, R)) sum_{i<=k} P(i) rel(i); `map@10` is given whatever `ks` is;
    - `map@r` = (1 / R) sum_{i<=R} P(i) rel(i) (Musgrave et al. 2020). Where R exceeds the length of the list, the
      candidates that were not retrieved count as irrelevant, so the value is a lower bound;
    - `precision@r` = hits(R) / R, known as R-precision, with the same lower bound;
    - `mrr` = 1 / place of the first hit, 0 without one in the list.

    A list shorter than k is not padded: its missing places are misses. Raises `BadInput` for a cut-off below 1 and for
    queries with R = 0, whose metrics do not exist: leave them out and report their number.
    """
    ks = sorted_cutoffs(ks)
    if bool((n_relevant <= 0).any()):
        n_without = int((n_relevant <= 0).sum())
        raise BadInput(f"{n_without} queries have no relevant gallery item; leave them out and count them")
    # [query, k + 1]: hits(i) and sums of P(i) rel(i). A column is one cut-off; the last one serves for longer ones.
    length = is_relevant.shape[1]
    hits, precision_sums = running_sums(is_relevant)
    n_hits = {k: hits[:, min(k, length)] for k in ks}
    values: PerQuery = {f"cmc@{k}": (n_hits[k] > 0).double() for k in ks}
    values |= {f"precision@{k}": n_hits[k] / k for k in ks}
    values |= {f"recall@{k}": n_hits[k] / n_relevant.double() for k in ks}
    for k in sorted({*ks, 10}):
        values[f"map@{k}"] = precision_sums[:, min(k, length)] / n_relevant.clamp(max=k).double()
    # The cut-off R differs from query to query.
    for name, sums in (("map@r", precision_sums), ("precision@r", hits)):
        at_r = sums.gather(1, n_relevant.clamp(max=length)[:, None]).squeeze(1)
        values[name] = at_r / n_relevant.double()
    place = first_hit(is_relevant).double()
    values["mrr"] = torch.where(place > 0, 1 / place.clamp(min=1), 0.0)
    return values


def sorted_cutoffs(ks: Sequence[int]) -> list[int]:
    """The distinct cut-offs in ascending order. Raises `BadInput` where there are none or one is below 1."""
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise BadInput(f"ks={list(ks)} must be one or more cut-offs of at least 1")
    return ks


def running_sums(
    is_relevant: Bool[Tensor, "query k"],
) -> tuple[Float64[Tensor, "query places"], Float64[Tensor, "query places"]]:
    """hits(i) and the sum of P(j) rel(j) over j <= i, for i = 0, 1, ..., k (see `per_query`)."""
    places = torch.arange(1, is_relevant.shape[1] + 1, dtype=torch.float64, device=is_relevant.device)
    rel = is_relevant.double()
    hits = rel.cumsum(dim=1)
    precision_sums = (hits / places).mul_(rel).cumsum_(dim=1)
    return functional.pad(hits, (1, 0)), functional.pad(precision_sums, (1, 0))


def means(values: Mapping[str, Float64[Tensor, " query"]]) -> dict[str, float]:
    """Mean over the queries of every metric. Raises `BadInput` where there is no query.

    The sum is rounded once (`math.fsum`), so it is the same for any order and any blocks of the queries.
    """
    n_queries = {len(column) for column in values.values()}
    assert len(n_queries) <= 1, f"metrics of different numbers of queries: {sorted(n_queries)}"
    if 0 in n_queries:
        raise BadInput("no query has a relevant gallery item, so there is no metric; check labels and is_gallery")
    return {key: math.fsum(column.tolist()) / len(column) for key, column in values.items()}


def means_by_category(
    values: Mapping[str, Float64[Tensor, " query"]], categories: Int64[Tensor, " query"]
) -> dict[int, dict[str, float]]:
    """`means` within each category, by category number in ascending order."""
    rows = rows_by_category(categories)
    return {number: means({key: column[own] for key, column in values.items()}) for number, own in rows.items()}


def rows_by_category(categories: Int64[Tensor, " query"]) -> dict[int, Int64[Tensor, " row"]]:
    """The rows of each category in ascending order, by category number in ascending order."""
    # One sort for all categories: each is then one piece of `order`.
    order = categories.argsort(stable=True)
    numbers, sizes = torch.unique_consecutive(categories[order], return_counts=True)
    return dict(zip(numbers.tolist(), torch.split(order, sizes.tolist()), strict=True))


def _join(first: _Keys, second: _Keys) -> _Keys:
    """One key for each pair of keys, equal where both are equal."""
    n_queries = len(first[0])
    # Numbers 0, 1, 2, ... for the distinct keys of each kind, of queries and gallery together, so that products are
    # small.
    dense = [torch.unique(torch.cat(keys), return_inverse=True)[1] for keys in (first, second)]
    joined = dense[0] * (dense[1].max() + 1 if len(dense[1]) else 1) + dense[1]
    return joined[:n_queries], joined[n_queries:]


def _count_equal(queries: Int64[Tensor, " query"], gallery: Int64[Tensor, " gallery"]) -> Int64[Tensor, " query"]:
    """How many gallery keys equal each query key."""
    # [query]: the equal keys are one run of the sorted gallery; its end less its start.
    ordered = gallery.sort().values
    return torch.searchsorted(ordered, queries, right=True) - torch.searchsorted(ordered, queries)
