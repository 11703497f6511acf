"""Candidate lists: the one form in which search, chain, training and evaluation hand on who is near whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor


@dataclass(frozen=True)
class CandidateLists:
    """Candidates of each query, best first; queries and candidates are item numbers of one catalogue.

    A list with fewer than k candidates is filled up with item -1 at distance inf. Lists that are kept have int32 items;
    `of_queries` and `long` give int64 ones, which torch needs for indexing.
    """

    query_items: Int64[Tensor, " query"]
    items: Int[Tensor, "query k"]
    distances: Float[Tensor, "query k"]

    @classmethod
    def from_arrays(
        cls,
        query_items: Int64[np.ndarray, " query"],
        items: Int[np.ndarray, "query k"],
        distances: Float32[np.ndarray, "query k"],
    ) -> "CandidateLists":
        """Lists on the memory of these arrays."""
        return cls(torch.from_numpy(query_items), torch.from_numpy(items), torch.from_numpy(distances))

    def arrays(
        self,
    ) -> tuple[Int64[np.ndarray, " query"], Int[np.ndarray, "query k"], Float32[np.ndarray, "query k"]]:
        """Queries, items and distances as arrays on the same memory."""
        return self.query_items.numpy(), self.items.numpy(), self.distances.numpy()

    def cpu(self) -> "CandidateLists":
        """The lists in the memory of the CPU."""
        return CandidateLists(self.query_items.cpu(), self.items.cpu(), self.distances.cpu())

    def __len__(self) -> int:
        return len(self.query_items)

    def __getitem__(self, rows: Int64[Tensor, " row"] | slice) -> "CandidateLists":
        """The lists in these rows."""
        return CandidateLists(self.query_items[rows], self.items[rows], self.distances[rows])

    def long(self) -> "CandidateLists":
        """The lists with int64 items."""
        return replace(self, items=self.items.long())

    def first(self, n: int) -> "CandidateLists":
        """The first `n` candidates of each list."""
        return CandidateLists(self.query_items, self.items[:, :n], self.distances[:, :n])

    def padded(self, k: int) -> "CandidateLists":
        """The lists with `k` places, of which the last ones are empty."""
        more = (0, k - self.items.shape[1])
        items = torch.nn.functional.pad(self.items, more, value=-1)
        return CandidateLists(self.query_items, items, torch.nn.functional.pad(self.distances, more, value=torch.inf))

    def of_queries(self, query_items: Int64[Tensor, " wanted"]) -> "CandidateLists":
        """The lists of these queries, in their order, a query without a list getting an empty one; int64 items.

        The queries of the lists must ascend.
        """
        found = empty_lists(query_items, self.items.shape[1])
        rows = places_of(self.query_items, query_items)
        found.items[rows >= 0] = self.items[rows[rows >= 0]].long()
        found.distances[rows >= 0] = self.distances[rows[rows >= 0]]
        return found

    def with_distances(self, distances: Float32[Tensor, "query k"]) -> "CandidateLists":
        """The same candidates with these distances, by (distance, item)."""
        by_item = torch.where(self.items >= 0, self.items, torch.iinfo(self.items.dtype).max).argsort(dim=1)
        order = by_item.gather(1, distances.gather(1, by_item).argsort(dim=1, stable=True))
        return CandidateLists(self.query_items, self.items.gather(1, order), distances.gather(1, order))

    def without(self, is_unwanted: Bool[Tensor, "query k"]) -> tuple["CandidateLists", Int64[Tensor, "query k"]]:
        """The lists without these candidates, the ones behind moving up; and the old column of each new one."""
        is_empty = is_unwanted | (self.items < 0)
        columns = is_empty.to(torch.uint8).argsort(dim=1, stable=True)
        items = torch.where(is_empty, -1, self.items).gather(1, columns)
        distances = torch.where(is_empty, torch.inf, self.distances).gather(1, columns)
        return CandidateLists(self.query_items, items, distances), columns


def empty_lists(query_items: Int64[Tensor, " query"], k: int) -> CandidateLists:
    """Lists of k places without any candidate, on the device of `query_items`."""
    items = torch.full((len(query_items), k), -1, dtype=torch.int64, device=query_items.device)
    return CandidateLists(query_items, items, torch.full(items.shape, torch.inf, device=items.device))


def concatenate(parts: Sequence[CandidateLists]) -> CandidateLists:
    """The lists of all parts, in the order given; all are equally long."""
    return CandidateLists(
        torch.cat([part.query_items for part in parts]),
        torch.cat([part.items for part in parts]),
        torch.cat([part.distances for part in parts]),
    )


def places_of(keys: Int64[Tensor, " key"], wanted: Int64[Tensor, "*wanted"]) -> Int64[Tensor, "*wanted"]:
    """The place of each wanted number among the ascending keys; -1 = it is not there."""
    if not len(keys):
        return torch.full_like(wanted, -1)
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, places, -1)


@runtime_checkable
class Ranking(Protocol):
    """Gives the lists of any rows of queries: stored ones, or computed on demand."""

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> CandidateLists:
        """The lists in these rows."""
        ...
