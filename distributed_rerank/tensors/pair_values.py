"""Values of pairs of items, looked up by pair: a teacher's logits, another system's scores."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from distributed_rerank.tensors.candidate_lists import CandidateLists


@dataclass(frozen=True)
class PairValues:
    """A value for each of some pairs of a query and a candidate; no pair comes twice."""

    keys: Int64[Tensor, " pair"]
    """query item x number of items + candidate, ascending."""
    values: Float32[Tensor, " pair"]
    n_items: int

    @classmethod
    def of_lists(
        cls,
        lists: CandidateLists,
        values: Float[Tensor, "query k"],
        n_items: int,
        has_value: Bool[Tensor, "query k"] | None = None,
    ) -> "PairValues":
        """The values of the candidates of all lists, or of those that have one. `n_items`: of the catalogue."""
        is_pair = lists.items >= 0 if has_value is None else has_value
        keys, order = (lists.query_items[:, None] * n_items + lists.items)[is_pair].sort()
        return cls(keys, values[is_pair][order].float(), n_items)

    def __len__(self) -> int:
        return len(self.keys)

    def look_up(
        self, query_items: Int64[Tensor, "*pairs"], candidates: Int[Tensor, "*pairs"]
    ) -> Float32[Tensor, "*pairs"]:
        """The value of each of these pairs; NaN where there is none, and for a candidate below 0."""
        wanted = query_items.long() * self.n_items + candidates
        if not len(self):
            return torch.full(wanted.shape, torch.nan)
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self) - 1)
        return torch.where((self.keys[place] == wanted) & (candidates >= 0), self.values[place], torch.nan)
