"""Several photos of one thing: how their probabilities are combined, chosen on set-aside labels like a chain step."""

from dataclasses import replace
from typing import get_args

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.choice import best, judge, log_decisions
from distributed_rerank.chain.evidence import Evidence, Trial, half_of_labels, try_chain
from distributed_rerank.chain.probability import probabilities
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.metrics import PerQuery
from distributed_rerank.tensors.things import Combination, ThingLists, by_thing


def things_of(chain: Chain, lists: CandidateLists, things: Int64[Tensor, " item"]) -> ThingLists:
    """The things in the chain's lists, as the chain combines their photos."""
    return by_thing(lists, _photo_probabilities(chain, lists), things, chain.views)


def choose_views(evidence: Evidence, chain: Chain, seed: int, accept: float) -> Chain:
    """The chosen chain with the combination of photos for these labels, and the decision in `chosen_on`.

    The best photo alone counts, unless another combination surely gains on labels that it was not chosen on.
    """
    is_first_half = half_of_labels(evidence.query_labels(), seed)
    if evidence.things is None or not chain.calibration or bool(is_first_half.all()) or not bool(is_first_half.any()):
        return chain
    chosen = try_chain(evidence, chain)
    by_item = replace(evidence, n_relevant=evidence.things.n_relevant)

    def measure(combination: Combination) -> PerQuery:
        assert evidence.things is not None, "there are things"
        found = things_of(replace(chain, views=combination), chosen.lists, evidence.things.numbers)
        return by_item.measure(by_item.queries, found.views[by_item.queries])

    first, *others = get_args(Combination)
    values = {combination: measure(combination) for combination in (first, *others)}
    alone = Trial(chain, values[first], chosen.lists)
    crossed = {key: column.clone() for key, column in values[first].items()}
    measured = [values[other] for other in others]
    for half in (is_first_half, ~is_first_half):
        picked = measured[best(measured, alone, half)]
        for key in crossed:
            crossed[key][~half] = picked[key][~half]
    decision = judge("views", values[first], crossed, alone, by_item.query_labels(), seed, accept)
    log_decisions([decision])
    everyone = torch.ones_like(is_first_half)
    taken = others[best(measured, alone, everyone)] if decision["taken"] else first
    return replace(chain, views=taken, chosen_on={**chain.chosen_on, "views": decision})


def _photo_probabilities(chain: Chain, lists: CandidateLists) -> Float64[Tensor, "query k"] | None:
    """The probability of each candidate that the pairwise step orders, NaN for others; None without a calibration."""
    found = probabilities(chain, lists.distances)
    if found is None:
        return None
    depth = lists.items.shape[1] if chain.pairwise is None else chain.pairwise.top_n
    is_known = (lists.items >= 0) & (torch.arange(lists.items.shape[1]) < depth)
    return torch.where(is_known, found, torch.nan)
