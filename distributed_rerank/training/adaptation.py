"""The first chain step: a map of the embeddings before the search, chosen on labels that it was not fitted to.

Labels are in two sides. Each side is searched over embeddings mapped by an adapter that was fitted to the other side.
So are the lists that the pairwise model is trained on and that the rest of the chain is chosen on. The adapter that is
kept is fitted to both.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from distributed_rerank.chain.chain import AdaptStep, Chain
from distributed_rerank.chain.choice import best, cross_fitted_values, row
from distributed_rerank.chain.decision import ACCEPT, is_likely, judge, log_decisions
from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.chain.settings import Settings
from distributed_rerank.chain.trials import Trial
from distributed_rerank.models.adapter import Adapter, Kind, fit_adapters
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.label_split import FEW_LABELS, usable_labels

logger = logging.getLogger(__name__)

FOLDS, FEW_ITEMS = 12, 50
FEW_TRIED: tuple[Kind, float] = ("whiten", 0.0)
TRIED: tuple[tuple[Kind, float], ...] = (("centre", 0.0), ("whiten", 0.0), ("discriminate", 4.0), ("discriminate", 1.0))

Search = Callable[[Float32[np.ndarray, "item dim"], str], tuple[CandidateLists, CandidateLists]]
"""Lists of both sides, each among itself, over these embeddings; the text names the search."""
MeasureLists = Callable[[tuple[CandidateLists, CandidateLists]], Evidence]


@dataclass(frozen=True)
class Adaptation:
    """What was chosen, with the lists and embeddings to train and to choose the rest of the chain on."""

    lists: tuple[CandidateLists, CandidateLists]
    embeddings: Float32[np.ndarray, "item dim"]
    """Cross-fitted: each item's by the adapter that was fitted to the other side."""
    step: AdaptStep | None = None
    adapter: Adapter | None = None
    decision: dict[str, Any] | None = None
    """For chain.json; None where nothing was tried."""
    plain: "Adaptation | None" = None
    """Without the adapter, where it is likely to gain but not sure: it is judged as one with the steps behind it."""


def choose_adaptation(
    embeddings: Float32[np.ndarray, "item dim"],
    labels: Int64[np.ndarray, " item"],
    sequences: Int64[np.ndarray, " item"],
    side: Int64[np.ndarray, " item"],
    search: Search,
    measure: MeasureLists,
    seed: int,
    accept: float = ACCEPT,
) -> Adaptation:
    """The adapter that improves the lists of labels it was not fitted to, if any does."""
    plain = Adaptation(search(embeddings, "plain"), embeddings)
    x, number = torch.from_numpy(embeddings), torch.from_numpy(labels)
    if len(usable_labels(labels)) <= FEW_LABELS:
        return choose_by_folds(plain, x, labels, sequences, side, search, measure, seed, accept)
    halves = [fit_adapters(x[is_in], number[is_in], TRIED) for is_in in (torch.from_numpy(side == s) for s in (0, 1))]
    usable = [place for place in range(len(TRIED)) if all(half[place] is not None for half in halves)]
    first_stage, evidence = trial_of(measure, plain.lists, Chain())
    tried: list[Adaptation] = []
    trials: list[Trial] = []
    for place in usable:
        kind, floor = TRIED[place]
        mapped = cross_fitted(embeddings, side, [half[place] for half in halves])
        lists, step = search(mapped, f"{kind}-{floor:g}"), AdaptStep(kind, floor)
        tried.append(Adaptation(lists, mapped, step))
        trials.append(trial_of(measure, lists, Chain((step,)))[0])
    is_first = torch.from_numpy(side == 0)[sorted_items(plain.lists)][evidence.queries]
    if not trials or bool(is_first.all()) or not bool(is_first.any()):
        return plain
    values = [trial.values for trial in trials]
    settings = Settings([trial.chain for trial in trials], values, lambda number, is_first: values[number])
    fitted = cross_fitted_values(settings, first_stage, is_first, best)
    of_queries, families = evidence.query_labels(), evidence.query_families()
    decision = judge("adapt", first_stage.values, fitted, first_stage, of_queries, seed, accept, families=families)
    chosen = best(values, first_stage, torch.ones_like(is_first))
    decision |= {
        "first_stage": first_stage.figures(),
        "table": [row(trial.chain, trial.values) for trial in (first_stage, *trials)],
    }
    unadapted = replace(plain, decision=decision)
    decision["as_one"] = may_join(decision, evidence)
    log_decisions([decision])
    if not decision["taken"] and not decision["as_one"]:
        return unadapted
    has_side = torch.from_numpy(side >= 0)
    (adapter,) = fit_adapters(x[has_side], number[has_side], [TRIED[usable[chosen]]])
    with_adapter = replace(tried[chosen], adapter=adapter, decision=decision)
    return replace(with_adapter, plain=unadapted) if decision["as_one"] else with_adapter


def choose_by_folds(
    plain: Adaptation,
    x: Float32[Tensor, "item dim"],
    labels: Int64[np.ndarray, " item"],
    sequences: Int64[np.ndarray, " item"],
    side: Int64[np.ndarray, " item"],
    search: Search,
    measure: MeasureLists,
    seed: int,
    accept: float,
) -> Adaptation:
    """The choice with few labels: only `FEW_TRIED`, so that no constant is chosen, on up to `FOLDS` folds of labels.

    The items of a fold are searched for among all items, mapped by the adapter that was fitted to the other folds.
    """
    items, number = torch.from_numpy(np.flatnonzero(side >= 0)), torch.from_numpy(labels)
    passes, known = torch.from_numpy(sequences), usable_labels(labels)
    fold = np.full(labels.max() + 1, -1)
    fold[known] = np.random.default_rng([seed, 0xF0D]).permutation(len(known)) % min(FOLDS, len(known))
    own = torch.from_numpy(np.where((side >= 0) & (labels >= 0), fold[labels], -1))

    def lists_of(queries: Int64[Tensor, " query"], mapped: Float32[Tensor, "item dim"]) -> CandidateLists:
        return nearest(
            mapped[queries], mapped[items], query_items=queries, gallery_items=items, n_items=FEW_ITEMS,
            query_sequences=passes[queries], gallery_sequences=passes[items],
        )  # fmt: skip

    halves = [
        fit_adapters(x[torch.from_numpy(side == s)], number[torch.from_numpy(side == s)], [FEW_TRIED])[0]
        for s in (0, 1)
    ]
    if any(half is None for half in halves):
        return plain
    parts = []
    for part in range(int(own.max()) + 1):
        (adapter,) = fit_adapters(x[(own != part) & (number >= 0)], number[(own != part) & (number >= 0)], [FEW_TRIED])
        if adapter is None:
            return plain
        parts.append(lists_of((own == part).nonzero()[:, 0], torch.from_numpy(adapter(x.numpy()))))
    alone = items[own[items] < 0]  # labels of one item, or none: no queries, but lists of all items are wanted
    step = AdaptStep(*FEW_TRIED)
    mapped = concatenate([*parts, lists_of(alone, x)])
    before, evidence = trial_of(measure, (lists_of(items, x), mapped[:0]), Chain())
    after, _ = trial_of(measure, (mapped, mapped[:0]), Chain((step,)))
    of_queries, families = evidence.query_labels(), evidence.query_families()
    decision = judge("adapt", before.values, after.values, before, of_queries, seed, accept, families=families)
    decision |= {
        "first_stage": before.figures(),
        "table": [row(trial.chain, trial.values) for trial in (before, after)],
    }
    unadapted = replace(plain, decision=decision)
    decision["as_one"] = may_join(decision, evidence)
    log_decisions([decision])
    if not decision["taken"] and not decision["as_one"]:
        return unadapted
    crossed = cross_fitted(plain.embeddings, side, halves)
    (adapter,) = fit_adapters(x[items], number[items], [FEW_TRIED])
    with_adapter = Adaptation(search(crossed, "few"), crossed, step, adapter, decision)
    return replace(with_adapter, plain=unadapted) if decision["as_one"] else with_adapter


def may_join(decision: dict[str, Any], evidence: Evidence) -> bool:
    """Whether an adapter that is not taken by itself is judged as one with the steps behind it.

    Not where images that the extractor has seen stand among the candidates: what an adapter gains there, it gains in
    part by telling them from the others.
    """
    return not decision["taken"] and evidence.is_seen is None and is_likely(decision)


def sorted_items(lists: Sequence[CandidateLists]) -> Int64[Tensor, " item"]:
    """The items of both sides, ascending: the order of the evidence."""
    return torch.cat([part.query_items for part in lists]).sort().values


def trial_of(
    measure: MeasureLists, lists: tuple[CandidateLists, CandidateLists], chain: Chain
) -> tuple[Trial, Evidence]:
    """The figures of these lists."""
    evidence = measure(lists)
    return Trial(chain, evidence.per_query(evidence.lists), evidence.lists), evidence


def cross_fitted(
    embeddings: Float[np.ndarray, "item dim"], side: Int64[np.ndarray, " item"], halves: Sequence[Adapter | None]
) -> Float32[np.ndarray, "item dim"]:
    """Each item's embedding by the adapter that was fitted to the other side; items of no side stay."""
    mapped = embeddings.astype(np.float32, copy=True)
    for number, adapter in enumerate(halves):
        assert adapter is not None, "both sides have an adapter"
        mapped[side == 1 - number] = adapter(embeddings[side == 1 - number])
    return mapped
