"""Several photos of one thing: how their probabilities are combined."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.probability import probabilities
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.things import ThingLists, by_thing


def things_of(chain: Chain, lists: CandidateLists, things: Int64[Tensor, " item"]) -> ThingLists:
    """The things in the chain's lists, as the chain combines their photos."""
    return by_thing(lists, _photo_probabilities(chain, lists), things, chain.views)


def _photo_probabilities(chain: Chain, lists: CandidateLists) -> Float64[Tensor, "query k"] | None:
    """The probability of each candidate that the pairwise step orders, NaN for others; None without a calibration."""
    found = probabilities(chain, lists.distances)
    if found is None:
        return None
    depth = lists.items.shape[1] if chain.pairwise is None else chain.pairwise.top_n
    is_known = (lists.items >= 0) & (torch.arange(lists.items.shape[1]) < depth)
    return torch.where(is_known, found, torch.nan)
