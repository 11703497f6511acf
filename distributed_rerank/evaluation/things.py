"""Metrics by thing: photos of one thing count as one result, as a shopper sees it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.views import things_of
from distributed_rerank.evaluation.measure import QUERIES_PER_BLOCK
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import columns, metrics, statistics
from distributed_rerank.tensors.candidate_lists import Ranking
from distributed_rerank.tensors.metrics import PerQuery
from distributed_rerank.tensors.things import count_relevant_things


def thing_figures(ranked: Ranked, *, ks: Sequence[int], seed: int, n_resamples: int = 2000) -> dict[str, Any]:
    """The figures by thing for metrics.json: first stage, after re-ranking, and the gains; {} without a column `item`.

    Judgements are of photos: with them there are no figures by thing.

    A query's relevant things have its label and a photo in the gallery that is neither itself nor of its sequence.
    `against_best_photo` is the gain of combining photos, where the chain does.
    """
    catalogue = ranked.catalogue
    if catalogue.things is None or catalogue.judgements is not None:
        return {}
    things = torch.from_numpy(catalogue.things)
    labels, sequences = (tensor_of(codes).long() for codes in (catalogue.labels, catalogue.sequences))
    gallery = torch.from_numpy(catalogue.gallery_items)
    n_relevant = count_relevant_things(ranked.query_items, gallery, labels, sequences, things)
    rows = n_relevant.nonzero().squeeze(1)
    query_labels = labels[ranked.query_items[rows]]

    def measure(ranking: Ranking, chain: Chain) -> PerQuery:
        def of_block(block: Tensor) -> PerQuery:
            views = things_of(chain, ranking[block], things).views
            is_relevant = metrics.relevance(views, labels[ranked.query_items[block]], labels)
            return metrics.per_query(is_relevant, n_relevant[block], ks)

        return columns.join(len(rows), map(of_block, rows.split(QUERIES_PER_BLOCK)))

    first = measure(ranked.before, Chain())
    figures: dict[str, Any] = {"n_items": len(things[gallery].unique()), "first_stage": metrics.means(first)}
    if not ranked.after:
        return figures
    last = measure(ranked.final, ranked.chain)
    compare = partial(statistics.compare_to_json, clusters=query_labels, seed=seed, n_resamples=n_resamples)
    figures |= {
        "combination": ranked.chain.views,
        "reranked": metrics.means(last),
        "difference": compare(first, last),
    }
    if ranked.chain.views != "best":
        best_photo = measure(ranked.final, replace(ranked.chain, views="best"))
        figures["against_best_photo"] = compare(best_photo, last)
    return figures
