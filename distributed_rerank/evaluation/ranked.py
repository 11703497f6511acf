"""The queries with their rankings before and after re-ranking: what an evaluation measures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.reranking.lists import (
    FirstStage,
    LazyRanking,
    is_one_against_rest,
    needs_joint_lists,
    only_gallery,
    without_rejected,
)
from distributed_rerank.reranking.rankings import by_logits, rankings
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors.candidate_lists import CandidateLists, Ranking


@dataclass(frozen=True)
class Ranked:
    """The queries with their rankings before and after; images that could not be read are in none of them."""

    first: FirstStage
    """Over adapted embeddings, where the chain begins with such a step."""
    scored: ScoredLists
    chain: Chain
    catalogue: Catalogue
    """The first stage's, but images that could not be read for scoring are neither query nor gallery."""
    query_items: Int64[Tensor, " query"]
    before: Ranking
    """By the embeddings as they are."""
    searched: Ranking
    """The candidates that the chain re-orders: `before`, or those of a search over adapted embeddings."""
    after: Mapping[int, Ranking]
    """The chain's ranking for each top_n; empty where the first stage alone is measured."""

    @property
    def final(self) -> Ranking:
        """The ranking that the chain ends with."""
        return self.after[max(self.after)] if self.after else self.before

    @property
    def covers_all_items(self) -> bool:
        """Whether gallery items have scored lists as well as queries."""
        catalogue = self.first.catalogue
        return needs_joint_lists(self.chain, catalogue) or is_one_against_rest(catalogue)

    @property
    def pairwise(self) -> Ranking | None:
        """The queries' rankings after the pairwise step alone; None where the chain has no such step."""
        if self.chain.pairwise is None or self.scored.logits is None:
            return None
        pairwise_only = Chain((self.chain.pairwise,))
        by_top_n = rankings(pairwise_only, self.scored, self.catalogue, None, self.query_items, curve=())
        ranking = next(iter(by_top_n.values()))
        if not self.chain.neighbourhood:
            return ranking
        # The lists are then those of all items, and hold queries that are no gallery items.
        everyone = torch.arange(len(self.query_items))
        return LazyRanking(everyone, lambda rows: only_gallery(ranking[rows], self.catalogue))

    def pairwise_lists(self) -> CandidateLists:
        """All scored lists after the pairwise step alone."""
        assert self.chain.pairwise is not None, "the chain has a pairwise step"
        assert self.scored.logits is not None, "its pairs are scored"
        return by_logits(self.chain.pairwise, self.scored.lists, self.scored.logits)


def rank(
    first: FirstStage, scored: ScoredLists, chain: Chain, has_model: bool, lists: CandidateLists | None = None
) -> Ranked:
    """The rankings of all readable queries by the first stage and by the chain, for each top_n of the curve.

    `lists` are those of the embeddings as they are, where `first` has others. A chain without steps that came with a
    model has a ranking too: the first stage's.
    """
    catalogue = first.catalogue
    searched, own = (
        without_rejected(ScoredLists(part, rejects=scored.rejects), catalogue).lists
        for part in (first.lists, first.lists if lists is None else lists)
    )
    rejected = catalogue.items_of([reject.id for reject in scored.rejects])
    query_items = torch.from_numpy(np.setdiff1d(catalogue.query_items, rejected))
    before = LazyRanking(query_items, own.of_queries)
    after: dict[int, Ranking] = {}
    if chain.steps or has_model:
        after = rankings(chain, scored, catalogue, first.embeddings, query_items)
    usable = catalogue if not len(rejected) else _without_roles(catalogue, rejected)
    return Ranked(
        first, scored, chain, usable, query_items, before, LazyRanking(query_items, searched.of_queries), after
    )


def _without_roles(catalogue: Catalogue, items: np.ndarray) -> Catalogue:
    """The same catalogue with the same numbering, in which these items are neither query nor gallery."""
    flags = catalogue.table[["is_query", "is_gallery"]].copy()
    flags.iloc[items] = False
    return replace(catalogue, table=catalogue.table.assign(**flags))
