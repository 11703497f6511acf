"""Rankings of queries that are computed on demand, and lists without what is no gallery item."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors.candidate_lists import CandidateLists


@dataclass(frozen=True)
class LazyRanking:
    """A ranking of which only the rows that are asked for are computed, and in memory."""

    query_items: Int64[Tensor, " query"]
    compute: Callable[[Tensor], CandidateLists]
    """Gives the lists of the query items it gets."""

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> CandidateLists:
        """The lists of the queries in these rows."""
        return self.compute(self.query_items[rows])


def only_gallery(lists: CandidateLists, catalogue: Catalogue) -> CandidateLists:
    """The lists without what is no gallery item."""
    is_gallery = torch.zeros(len(catalogue) + 1, dtype=torch.bool)  # the last entry belongs to item -1
    is_gallery[:-1] = tensor_of(catalogue.is_gallery)
    is_kept = is_gallery[lists.items]
    if bool((is_kept | (lists.items < 0)).all()):
        return lists
    return lists.without(~is_kept)[0]
