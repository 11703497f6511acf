"""All that an evaluation has ranked, which every figure is made from. Layer 3."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.reranking import run as ranking_run
from distributed_rerank.reranking.first_stage import FirstStage
from distributed_rerank.reranking.lists import LazyRanking, neighbours, only_gallery, ranking_of
from distributed_rerank.reranking.run import Scored
from distributed_rerank.tensors.knn import Ranking


@dataclass(frozen=True)
class Ranked:
    """The queries with their rankings before and after, both without the images that could not be read."""

    first: FirstStage
    scored: Scored
    chain: Chain
    catalogue: Catalogue
    """The first stage's, in which an image that only scoring found unreadable is neither query nor gallery."""
    query_items: Int64[Tensor, " query"]
    before: Ranking
    after: Mapping[int, Ranking]
    """By top_n, the chain's last; empty where the first stage alone is measured."""

    @property
    def final(self) -> Ranking:
        """The ranking that the chain ends with."""
        return self.after[max(self.after)] if self.after else self.before

    @property
    def covers_all_items(self) -> bool:
        """Whether gallery items have scored lists as well as queries."""
        return bool(self.chain.neighbourhood) or ranking_run.is_one_against_rest(self.first.catalogue)

    @property
    def pairwise(self) -> Ranking | None:
        """The queries' rankings after the pairwise step alone; None where the chain has no such step."""
        if self.chain.pairwise is None or self.scored.logits is None:
            return None
        alone = Chain((self.chain.pairwise,))
        made = ranking_run.rankings(alone, self.scored, self.catalogue, None, self.query_items, curve=())
        ranking = next(iter(made.values()))
        if not self.chain.neighbourhood:
            return ranking
        # the lists are then those of all items, and hold queries that are no gallery items
        everyone = torch.arange(len(self.query_items))
        return LazyRanking(everyone, lambda rows: only_gallery(ranking[rows], self.catalogue))

    def pairwise_lists(self) -> CandidateLists:
        """All scored lists after the pairwise step alone."""
        assert self.chain.pairwise is not None, "the chain has a pairwise step"
        assert self.scored.logits is not None, "its pairs are scored"
        logits = torch.from_numpy(self.scored.logits)
        lists = ranking_run.by_logits(self.chain.pairwise, neighbours(self.scored.lists), logits)
        return CandidateLists(self.scored.lists.query_items, lists.items.numpy(), lists.distances.numpy())


def rank(first: FirstStage, scored: Scored, chain: Chain, has_model: bool) -> Ranked:
    """The rankings of all readable queries by the first stage and by the chain with each top_n of the curve.

    A model whose chain has no step is compared as well: its ranking is the first stage's.
    """
    catalogue = first.catalogue
    cleared = ranking_run.without_rejected(Scored(first.lists, None, scored.rejects), catalogue)
    rejected = catalogue.items_of([reject.id for reject in scored.rejects])
    query_items = torch.from_numpy(np.setdiff1d(catalogue.query_items, rejected))
    before = ranking_of(cleared.lists, query_items)
    after: dict[int, Ranking] = {}
    if chain.steps or has_model:
        after = ranking_run.rankings(chain, scored, catalogue, first.embeddings, query_items)
    usable = catalogue if not len(rejected) else _without_roles(catalogue, rejected)
    return Ranked(first, scored, chain, usable, query_items, before, after)


def _without_roles(catalogue: Catalogue, items: np.ndarray) -> Catalogue:
    """The same numbering, in which these items are neither query nor gallery."""
    flags = catalogue.table[["is_query", "is_gallery"]].copy()
    flags.iloc[items] = False
    return Catalogue(catalogue.table.assign(**{name: flags[name] for name in flags}), catalogue.source)
