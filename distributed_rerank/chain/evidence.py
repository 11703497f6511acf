"""The evidence for a choice of the chain: lists of labels that nothing was trained on, and a chain's figures there."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.config.training import Target
from distributed_rerank.tensors import label_split, metrics
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.metrics import PerQuery

CMC_WEIGHT = 2.0
"""Of CMC@1 beside mAP@10 in the objective: neighbourhood steps gain the second and can lose the first."""

AMONG_UNSEEN = " among unseen"
"""Ends the name of a metric of the same lists without the candidates that the extractor has seen."""

LEAST_FAMILIES = 5
"""Fewer would say nothing: with three of them a line has an interval of thirteen times its error."""


@dataclass(frozen=True)
class Things:
    """What the items show, where several photos show one thing."""

    numbers: Int64[Tensor, " item"]
    n_relevant: Int64[Tensor, " item"]
    """How many things of its label each item can find."""


@dataclass(frozen=True)
class Evidence:
    """The lists of all images of the set-aside labels, numbered 0, 1, ..."""

    lists: CandidateLists
    labels: Int64[Tensor, " item"]
    n_relevant: Int64[Tensor, " item"]
    """Relevant items of each item; items with none are candidates of others but no queries."""
    logits: Float[Tensor, "item top_n"] | None = None
    embeddings: Float[Tensor, "item dim"] | None = None
    target: Target = "both"
    """What a choice maximises: mAP@10 + `CMC_WEIGHT` CMC@1, or one metric."""
    things: Things | None = None
    families: Int64[Tensor, " item"] | None = None
    """One number for items of look-alike labels, whose gains are not independent; None = each label is alone."""
    is_seen: Bool[Tensor, " item"] | None = None
    """Items of labels that the extractor has seen, which are candidates only; None = there are none."""

    @property
    def queries(self) -> Int64[Tensor, " query"]:
        """The items that have relevant ones; only they are measured."""
        return (self.n_relevant > 0).nonzero().squeeze(1)

    def query_labels(self) -> Int64[Tensor, " query"]:
        """Labels of the queries."""
        return self.labels[self.queries]

    def query_families(self) -> Int64[Tensor, " query"]:
        """What varies together: families of the queries, or labels where there are fewer than `LEAST_FAMILIES`."""
        if self.families is None or len(self.families[self.queries].unique()) < LEAST_FAMILIES:
            return self.query_labels()
        return self.families[self.queries]

    def per_query(self, lists: CandidateLists) -> PerQuery:
        """`measure` for the queries, in item order, from lists of all items."""
        return self.measure(self.queries, lists.items[self.queries])

    def measure(self, queries: Int64[Tensor, " query"], candidates: Int64[Tensor, "query k"]) -> PerQuery:
        """mAP@10, CMC@1, the target and the objective for some queries, from their own ranked candidates.

        Where the extractor has seen some candidates, also the metrics of the lists without them (`AMONG_UNSEEN`).
        """
        is_relevant = metrics.relevance(candidates, self.labels[queries], self.labels)
        values = metrics.per_query(is_relevant, self.n_relevant[queries], (1, 10))
        both = values["map@10"] + CMC_WEIGHT * values["cmc@1"]
        names = [key for key in dict.fromkeys(("map@10", "cmc@1", self.target)) if key in values]
        kept = {key: values[key] for key in names}
        if self.is_seen is not None:
            unseen = metrics.per_query(self.without_seen(candidates, is_relevant), self.n_relevant[queries], (1, 10))
            kept |= {f"{key}{AMONG_UNSEEN}": unseen[key] for key in names}
        return {**kept, "objective": both if self.target == "both" else values[self.target]}

    def without_seen(
        self, candidates: Int64[Tensor, "query k"], is_relevant: Bool[Tensor, "query k"]
    ) -> Bool[Tensor, "query k"]:
        """The relevance of the candidates that the extractor has not seen, those behind a seen one moved up."""
        assert self.is_seen is not None, "some candidates are seen"
        # [query, k]: no seen item is relevant, so that the places they leave at the end count as not relevant.
        is_seen = self.is_seen[candidates.clamp(min=0)] & (candidates >= 0)
        return is_relevant.gather(1, is_seen.long().argsort(dim=1, stable=True))

    def labelled_pairs(
        self, lists: CandidateLists, top_n: int, is_counted: Bool[Tensor, " query"] | None = None
    ) -> tuple[Float[Tensor, " pair"], Bool[Tensor, " pair"]]:
        """Distance, and whether it is a match, of each pair of a query and its first `top_n` candidates.

        Only queries where `is_counted` is True; None = all.
        """
        rows = self.queries if is_counted is None else self.queries[is_counted]
        items, distances = lists.items[rows, :top_n], lists.distances[rows, :top_n]
        is_there = (items >= 0) & distances.isfinite()
        return distances[is_there], metrics.relevance(items, self.labels[rows], self.labels)[is_there]


def half_of_labels(labels: Int64[Tensor, " query"], seed: int) -> Bool[Tensor, " query"]:
    """Which queries belong to the first half of the labels, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return label_split.half_of_labels(labels, lambda n: torch.randperm(n, generator=generator))
