"""Candidate lists as rankings of queries, whole or a few rows at a time. Layer 3."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.tensors.knn import Neighbours, Ranking


def neighbours(lists: CandidateLists) -> Neighbours:
    """The lists as tensors."""
    return Neighbours(torch.from_numpy(lists.items), torch.from_numpy(lists.distances))


def rows_of(lists: CandidateLists, query_items: Tensor) -> Neighbours:
    """The lists of these queries, in their order; a query without candidates has an empty one."""
    rows = np.searchsorted(lists.query_items, query_items.numpy()).clip(max=max(len(lists.query_items) - 1, 0))
    if len(lists.query_items) == 0:
        shape = (len(query_items), lists.items.shape[1])
        return Neighbours(torch.full(shape, -1), torch.full(shape, torch.inf))
    has = (lists.query_items[rows] == query_items.numpy())[:, None]
    items = np.where(has, lists.items[rows], -1)
    distances = np.where(has, lists.distances[rows], np.float32(np.inf))
    return Neighbours(torch.from_numpy(items), torch.from_numpy(distances))


@dataclass(frozen=True)
class LazyRanking:
    """A ranking of which only the rows that are asked for are made, and in memory."""

    query_items: Tensor
    make: Callable[[Tensor], Neighbours]
    """The rows of the query items that it is given."""

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> Neighbours:
        """The rows of these queries."""
        return self.make(self.query_items[rows])


def ranking_of(lists: CandidateLists, query_items: Tensor) -> Ranking:
    """`rows_of`, made when asked for."""
    return LazyRanking(query_items, partial(rows_of, lists))


def only_gallery(ranked: Neighbours, catalogue: Catalogue) -> Neighbours:
    """The rankings without what is no gallery item."""
    is_gallery = torch.zeros(len(catalogue) + 1, dtype=torch.bool)
    is_gallery[torch.from_numpy(catalogue.gallery_items)] = True
    is_kept = is_gallery[ranked.items]
    if bool((is_kept | (ranked.items < 0)).all()):
        return ranked
    order = (~is_kept).to(torch.uint8).argsort(dim=1, stable=True)
    items = torch.where(is_kept, ranked.items, -1).gather(1, order)
    return Neighbours(items, torch.where(is_kept, ranked.distances, torch.inf).gather(1, order))
