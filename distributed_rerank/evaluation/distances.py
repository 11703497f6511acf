"""Distances of positives and negatives, and cross-label pairs so near that a label may be wrong. Layer 3."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_rerank.evaluation.measure import LabelledQueries
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.tensors.knn import Ranking

N_BINS = 30
N_SUSPECTS = 12
_BLOCK_ROWS = 4096


def separation(ranking: Ranking, queries: LabelledQueries, top_n: int) -> dict[str, Any]:
    """Histogram of the distances of the first `top_n` candidates, relevant ones and others counted apart.

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
        is_there = distances.isfinite()
        for name, chosen in (("relevant", is_there & is_relevant), ("other", is_there & ~is_relevant)):
            counts[name] += np.histogram(distances[chosen].double().numpy(), edges)[0]
    return {"top_n": top_n, "edges": edges.tolist()} | {name: column.tolist() for name, column in counts.items()}


def _heads(ranking: Ranking, queries: LabelledQueries, top_n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Relevance and distances of the first candidates of the labelled queries, some rows at a time."""
    for block in queries.blocks():
        found = ranking[block.rows]
        items = found.items[:, :top_n]
        labels = torch.where(items >= 0, block.item_labels[items], -1)
        yield (labels == block.labels[:, None]) & (items >= 0), found.distances[:, :top_n]


def suspects(ranked: Ranked) -> list[dict[str, Any]]:
    """At most `N_SUSPECTS` pairs of different labels, the nearest first: one of the two labels may be wrong.

    The distance is the pairwise step's where the chain has one (it saw both images), else the first stage's. Only the
    nearest candidate of another label counts for each query, and an image is in one pair only; ties by item.
    """
    labels = torch.from_numpy(ranked.catalogue.labels)
    ranking = ranked.pairwise or ranked.before
    queries, candidates, distances, columns = _nearest_of_another_label(ranking, labels, ranked.query_items)
    shown: list[dict[str, Any]] = []
    taken: set[int] = set()
    catalogue, names = ranked.catalogue, ranked.catalogue.label_names
    for place in np.lexsort((candidates.numpy(), queries.numpy(), distances.numpy())).tolist():
        query, candidate = int(queries[place]), int(candidates[place])
        if len(shown) == N_SUSPECTS:
            break
        if query in taken or candidate in taken:
            continue
        taken |= {query, candidate}
        shown.append(
            {
                "query_id": str(catalogue.ids[query]),
                "query_label": str(names[int(labels[query])]),
                "gallery_id": str(catalogue.ids[candidate]),
                "gallery_label": str(names[int(labels[candidate])]),
                "distance": float(distances[place]),
                "rank": int(columns[place]) + 1,
            }
        )
    return shown


def _nearest_of_another_label(
    ranking: Ranking, labels: Tensor, query_items: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, candidate, distance and column of each query's nearest candidate of another known label, if any."""
    parts = []
    for block in torch.arange(len(query_items)).split(_BLOCK_ROWS):
        found = ranking[block]
        own = labels[query_items[block]][:, None]
        is_other = (found.items >= 0) & (labels[found.items] != own) & (labels[found.items] >= 0) & (own >= 0)
        is_other &= found.distances.isfinite()
        if not is_other.shape[1]:
            continue
        row = is_other.any(dim=1).nonzero().squeeze(1)
        column = is_other[row].to(torch.uint8).argmax(dim=1)
        parts.append((query_items[block[row]], found.items[row, column], found.distances[row, column], column))
    none = torch.zeros(0, dtype=torch.int64)
    first, *others = [torch.cat(column) for column in zip((none, none, none.float(), none), *parts, strict=True)]
    return first, others[0], others[1], others[2]
