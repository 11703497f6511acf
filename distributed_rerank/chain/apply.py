"""A chain applied to candidate lists: each chain step re-orders the lists of the one before.

The lists are those of all items of a search, queries and gallery alike, numbered 0, 1, ...; neighbourhood steps look at
the lists of an item's candidates. Where the candidates are gallery items alone, so is everything that an answer depends
on beside its query (reciprocal neighbours excepted). Only alpha_qe, which searches again, brings new candidates.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from distributed_rerank.chain.chain import (
    AdaptStep,
    AlphaQEStep,
    Chain,
    KReciprocalStep,
    NeighbourhoodStep,
    OwnStep,
    PairwiseStep,
    ProbabilityStep,
    QueryExpansionStep,
    kind_of,
    require,
)
from distributed_rerank.tensors import calibration, reranking
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.match_neighbourhood import mix, overlap_distances, reorder_stably
from distributed_rerank.tensors.neighbourhood import distance_scale, k_reciprocal
from distributed_rerank.tensors.query_expansion import expand_embeddings, expanded_distances


def apply(
    chain: Chain,
    lists: CandidateLists,
    logits: Float[Tensor, "item top_n"] | None = None,
    embeddings: Float[Tensor, "item dim"] | None = None,
    sequences: Int64[Tensor, " item"] | None = None,
    gallery: Int64[Tensor, " gallery"] | None = None,
) -> CandidateLists:
    """The lists after all chain steps; the input is not changed.

    `gallery` are the items that may be candidates, by default all. What is the same for all lists (scales, shifts)
    comes from theirs, so that it does not depend on the queries.

    `logits` are those of the first candidates of each list, NaN where there is none; a pairwise step needs them.
    alpha_qe and query_expansion need `embeddings`. `sequences` (negative = none) keep the new search of alpha_qe from
    finding an item's own sequence.
    """
    for step in chain.steps:
        if isinstance(step, AdaptStep):
            continue  # the lists come from a search over what it maps
        if isinstance(step, PairwiseStep):
            assert logits is not None, "a pairwise step needs logits"
            lists = apply_pairwise(step, lists, logits)
        elif isinstance(step, KReciprocalStep):
            lists = apply_k_reciprocal(step, lists, gallery)
        elif isinstance(step, AlphaQEStep):
            assert embeddings is not None, "alpha_qe needs embeddings"
            lists = apply_alpha_qe(step, lists, embeddings, sequences, gallery)
        elif isinstance(step, NeighbourhoodStep | QueryExpansionStep):
            lists = apply_by_probability(step, lists, embeddings, gallery)
        else:
            lists = apply_own(step, lists, embeddings, gallery)
    return lists


def apply_own(
    step: OwnStep,
    lists: CandidateLists,
    embeddings: Float[Tensor, "item dim"] | None,
    gallery: Int64[Tensor, " gallery"] | None,
) -> CandidateLists:
    """The lists by a chain step of the user's. Raises BadInput where it changes more than the order."""
    found = step.apply(lists, embeddings, gallery)
    name = kind_of(step)
    is_same = found.items.shape == lists.items.shape and torch.equal(
        found.items.sort().values, lists.items.sort().values
    )
    require(is_same, f"step {name} must return the candidates of each list in another order, no others")
    gaps = found.distances.diff(dim=1)
    require(not bool((gaps < 0).any()), f"step {name} must return distances that ascend in each list")
    return found


def apply_pairwise(step: PairwiseStep, lists: CandidateLists, logits: Float[Tensor, "query top_n"]) -> CandidateLists:
    """The lists of any queries by the chain step's rule; the tail behind `top_n` keeps its places."""
    # [query, top_n] logits -> [query, k] places of the candidates in their new order, and their new distances.
    head = logits[:, : step.top_n]
    if step.rule == "replace":
        order, distances = reranking.merge_replace(lists.distances, head)
    else:
        order, distances = reranking.fuse(
            lists.distances, head, weight=step.weight, temperature=step.temperature, top_n=step.top_n,
            pinned=step.pinned,
        )  # fmt: skip
    return replace(lists, items=lists.items.gather(1, order), distances=distances)


def apply_k_reciprocal(
    step: KReciprocalStep, lists: CandidateLists, gallery: Int64[Tensor, " gallery"] | None = None
) -> CandidateLists:
    """The lists of all items by k-reciprocal encoding; fused distances are shifted so that none is negative."""
    distances = lists.distances if gallery is None else lists.distances[gallery]
    finite = distances[distances.isfinite()]
    shift = min(0.0, float(finite.min())) if len(finite) else 0.0
    items, distances = k_reciprocal(
        lists.items, (lists.distances - shift).clamp(min=0), k1=step.k1, k2=step.k2, original_weight=step.weight
    )
    return replace(lists, items=items, distances=distances)


def apply_by_probability(
    step: ProbabilityStep,
    lists: CandidateLists,
    embeddings: Float[Tensor, "item dim"] | None,
    gallery: Int64[Tensor, " gallery"] | None = None,
) -> CandidateLists:
    """The lists of all items by neighbourhood or query expansion, with probabilities from the chain step's curve."""
    probabilities = probabilities_of(step, lists)
    everything = torch.arange(len(lists.items))
    # [item, k]: for each candidate the distance by neighbours, mixed with its own probability, then sorted.
    distances = neighbour_distances(step, lists, probabilities, embeddings, everything, gallery)
    mixed = mix(distances, probabilities, original_weight=step.weight)
    items, distances = reorder_stably(lists.items, mixed, step.pinned)
    return replace(lists, items=items, distances=distances)


def probabilities_of(step: ProbabilityStep, lists: CandidateLists) -> Float64[Tensor, "item k"]:
    """The probability of a match of each candidate, by the chain step's curve; 0 where there is no candidate."""
    probabilities = calibration.probability(lists.distances, calibration.Logistic(step.slope, step.intercept))
    return torch.where(lists.items >= 0, probabilities, 0.0)


def neighbour_distances(
    step: ProbabilityStep,
    lists: CandidateLists,
    probabilities: Float64[Tensor, "item k"],
    embeddings: Float[Tensor, "item dim"] | None,
    queries: Int64[Tensor, " query"],
    gallery: Int64[Tensor, " gallery"] | None = None,
) -> Float32[Tensor, "query k"]:
    """Distances of these items' candidates by their neighbours, before mixing; they do not depend on `step.weight`.

    Lists shorter than the chain step's k1, k2 or k are used whole.
    """
    longest = lists.items.shape[1]
    if longest == 0:
        return torch.empty(len(queries), 0)
    if isinstance(step, NeighbourhoodStep):
        k1, k2 = min(step.k1, longest), min(step.k2, longest)
        return overlap_distances(lists.items, probabilities, queries, kind=step.kind, k1=k1, k2=k2)
    assert embeddings is not None, "query expansion needs embeddings"
    everything = torch.arange(len(lists.items))
    # The scale is that of the gallery's lists, so all are computed although only those of `queries` are returned.
    distances = expanded_distances(embeddings, lists.items, probabilities, everything, k=step.k, alpha=step.alpha)
    return distances[queries] / distance_scale(distances if gallery is None else distances[gallery])


def apply_alpha_qe(
    step: AlphaQEStep,
    lists: CandidateLists,
    embeddings: Float[Tensor, "item dim"],
    sequences: Int64[Tensor, " item"] | None = None,
    gallery: Int64[Tensor, " gallery"] | None = None,
) -> CandidateLists:
    """A new search in the gallery with every embedding expanded by its neighbours in the lists."""
    expanded = expand_embeddings(embeddings, embeddings, lists.items, n_neighbours=step.k, alpha=step.alpha)
    items = torch.arange(len(embeddings))
    found = items if gallery is None else gallery
    return nearest(
        expanded, expanded[found], query_items=items, gallery_items=found, query_sequences=sequences,
        gallery_sequences=None if sequences is None else sequences[found], n_items=lists.items.shape[1],
    )  # fmt: skip
