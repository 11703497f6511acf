"""The rankings that a chain makes of scored lists."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distributed_rerank.chain import apply as chain_apply
from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.reranking.lists import LazyRanking, needs_joint_lists, only_gallery
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors.candidate_lists import CandidateLists, Ranking, places_of

CURVE = (2, 5, 10, 20, 50, 100, 200, 500)
"""Values of top_n that every scoring pass reports, as far as it reaches."""


def rankings(
    chain: Chain,
    scored: ScoredLists,
    catalogue: Catalogue,
    embeddings: Embeddings | None,
    query_items: Tensor,
    curve: Sequence[int] = CURVE,
) -> dict[int, Ranking]:
    """Rankings of the queries by the whole chain, for the chain's top_n and every smaller one of `curve`.

    Without a pairwise step there is one, under the length of the lists; without any step it is the first stage's.
    """
    if chain.pairwise is None:
        return {scored.lists.items.shape[1]: _ranking(chain, scored, catalogue, embeddings, query_items)}
    deepest = chain.pairwise.top_n
    found = {}
    for top_n in (*(n for n in curve if n < deepest), deepest):
        steps = (*chain.before_search, replace(chain.pairwise, top_n=top_n), *chain.neighbourhood)
        found[top_n] = _ranking(replace(chain, steps=steps), scored, catalogue, embeddings, query_items)
    return found


def _ranking(
    chain: Chain, scored: ScoredLists, catalogue: Catalogue, embeddings: Embeddings | None, query_items: Tensor
) -> Ranking:
    """Lazy if a query's ranking depends on its own list only; computed at once if the chain needs all lists."""
    if chain.neighbourhood:
        return _rerank(chain, scored, catalogue, embeddings, query_items)
    return LazyRanking(query_items, lambda items: _rerank(chain, _part(scored, items), catalogue, embeddings, items))


def _part(scored: ScoredLists, query_items: Tensor) -> ScoredLists:
    """The lists of these queries, as far as they have one."""
    rows = places_of(scored.lists.query_items, query_items.unique())
    rows = rows[rows >= 0]
    return replace(scored, lists=scored.lists[rows], logits=None if scored.logits is None else scored.logits[rows])


def _rerank(
    chain: Chain, scored: ScoredLists, catalogue: Catalogue, embeddings: Embeddings | None, query_items: Tensor
) -> CandidateLists:
    lists = scored.lists
    if chain.pairwise is not None:
        assert scored.logits is not None, "a pairwise step needs logits"
        lists = by_logits(chain.pairwise, lists, scored.logits)
    if not chain.neighbourhood:
        return lists.of_queries(query_items)
    # The steps that follow need the lists of all items, row i being that of item i.
    everything = lists.of_queries(torch.arange(len(catalogue)))
    matrix = None
    if embeddings is not None:
        matrix = torch.from_numpy(embeddings.matrix[embeddings.rows_of(catalogue.ids)])
    sequences = tensor_of(catalogue.sequences).long()
    gallery = None if needs_joint_lists(chain, catalogue) else torch.from_numpy(catalogue.gallery_items)
    reranked = chain_apply.apply(
        replace(chain, steps=chain.neighbourhood), everything, None, matrix, sequences, gallery
    )
    return only_gallery(reranked[query_items], catalogue)


def by_logits(step: PairwiseStep, lists: CandidateLists, logits: Tensor) -> CandidateLists:
    """The lists after the pairwise step, where some of a row's last logits may be NaN.

    Such candidates stood behind the first top_n when pairs were scored, and moved up because an image before them could
    not be read. They stay behind the scored ones; a row with fewer than two of these is left as it is.
    """
    logits = logits[:, : step.top_n]
    # [query]: candidates that are scored, missing ones included; rows of one number are re-ordered together.
    is_scored = logits.isfinite() | (lists.items[:, : logits.shape[1]] < 0)
    n_scored = is_scored.sum(dim=1)
    items, distances = lists.items.clone(), lists.distances.clone()
    for n in n_scored.unique().tolist():
        if n < min(2, logits.shape[1]):
            continue
        rows = (n_scored == n).nonzero()[:, 0]
        shorter = step if n == logits.shape[1] else replace(step, top_n=n)
        ranked = chain_apply.apply_pairwise(shorter, lists[rows], logits[rows, :n])
        items[rows], distances[rows] = ranked.items, ranked.distances
    return replace(lists, items=items, distances=distances)
