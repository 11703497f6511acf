"""The chain is chosen on labels set aside from `train`.

Chain steps are tried one after the other: first fusion of the logits with the first-stage distances, then
neighbourhoods and query expansion on the result; each of all candidates or, where that fails, of all but the first. A
chain step joins the chain only if its gain holds on labels that its constants were not chosen on: the set-aside labels
are halved, the best constants of either half are measured on the other, and a gain over the chain so far must be
probable enough (`judge`). Otherwise the chain stays as it was; with no chain step at all it is the first stage, and the
log says so.

With few labels no step may be sure to help, though the chain of all steps is. Where no step is taken by itself, the
likely ones are tried one on top of the other and judged as one. That is a second look at the same labels, so the bar is
higher.

Few labels among themselves are ranked so well that hardly any step can show a gain. Steps that need no model may use
all train labels as evidence, not only those that the model has not seen. So they are tried once more on these where
nothing was taken.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain, PairwiseStep, ProbabilityStep
from distributed_rerank.chain.decision import (
    ACCEPT,
    LIKELY,
    ON_ALL_LABELS,
    WITHOUT_ADAPTER,
    judge,
    log_decisions,
    probability_of_gain,
)
from distributed_rerank.chain.evidence import AMONG_UNSEEN, Evidence, half_of_labels
from distributed_rerank.chain.settings import FUSIONS, NEIGHBOURS, PINNED_NEIGHBOURS, Settings, settings_for
from distributed_rerank.chain.trials import Trial, calibrate, try_chain
from distributed_rerank.chain.views import things_of
from distributed_rerank.tensors.metrics import PerQuery
from distributed_rerank.tensors.things import Combination

logger = logging.getLogger(__name__)

MOVES_FIRST = 0.95
"""Neighbours may move the first candidate only where CMC@1 gains with this probability. Else it is pinned, so CMC@1 is
that of the pairwise step, on any labels."""
CLEARLY_BETTER = 0.005
"""A larger weight of the first stage must raise mAP@10 + CMC@1 by more than this. The measured models have seen fewer
labels than the model that is kept, and lean on the first stage more than it has to."""
Pick = Callable[[Sequence[PerQuery], Trial, Bool[Tensor, " query"]], int]
"""The number of the best setting by these values on some queries, beside the chain so far."""


@dataclass(frozen=True)
class Attempt:
    """The chain steps tried on some evidence, one after the other."""

    evidence: Evidence
    is_first_half: Bool[Tensor, " query"]
    chosen: Trial
    table: list[dict[str, Any]]
    """The first stage and every setting, for chain.json."""
    decisions: list[dict[str, Any]]
    gained: PerQuery
    """The values of every query with the steps taken, each step's constants from the half without its label."""

    def taken(self) -> list[str]:
        """Names of the steps taken."""
        return [decision["step"] for decision in self.decisions if decision["taken"]]


def choose(
    evidence: Evidence,
    seed: int = 0,
    accept: float = ACCEPT,
    all_labels: Evidence | None = None,
    unadapted: Evidence | None = None,
) -> Chain:
    """The chain for these labels, with the figures of every setting tried in `chosen_on` and a calibration.

    A step joins where the probability of its gain (`judge`) is at least `accept`. Without logits only the chain steps
    that need no training are tried. Where no step is taken, the likely ones are judged as one (`choose_together`).
    `all_labels` has more labels, or one gallery of all, and no logits: where nothing is taken from `evidence`, the
    steps that need no training are tried there. `unadapted` has the same queries and no logits, before an adapter that
    is only likely to gain: the steps are taken with it or not at all, and then those that need no training are tried
    without it.
    """
    attempt = try_steps(evidence, seed, accept)
    together = None
    if unadapted is not None or not attempt.chosen.chain.steps:
        attempt, together = choose_together(attempt, unadapted, seed, accept)
        if unadapted is not None and not attempt.chosen.chain.steps:
            plain = try_steps(unadapted, seed, accept, where=WITHOUT_ADAPTER)
            attempt = replace(plain, decisions=attempt.decisions + plain.decisions)
    if all_labels is not None and not attempt.chosen.chain.steps:
        again = try_steps(all_labels, seed, accept, where=ON_ALL_LABELS)
        kept = again if again.chosen.chain.steps else attempt
        attempt = replace(kept, decisions=attempt.decisions + again.decisions)
    current, labels = attempt.chosen, attempt.evidence.query_labels()
    decisions = attempt.decisions
    log_choice(current, [*decisions, *([] if together is None else [together])])
    chosen_on = {
        "n_labels": len(labels.unique()),
        "n_queries": len(labels),
        "first_stage": {key: attempt.table[0][key] for key in ("map@10", "cmc@1")},
        "chosen": current.figures(),
        "decisions": decisions,
        **({} if together is None else {"together": together}),
        "table": attempt.table,
    }
    calibration = calibrate(attempt.evidence, current, attempt.is_first_half)
    return replace(current.chain, chosen_on=chosen_on, calibration=calibration)


def choose_together(
    sure: Attempt, unadapted: Evidence | None, seed: int, accept: float
) -> tuple[Attempt, dict[str, Any] | None]:
    """The attempt to keep and the decision about its steps as one; no decision where there is one step or none.

    The steps are those taken, or else the likely ones. With an adapter that is only likely, it is the first of them,
    and they gain over the lists before it: without a decision for them no step is kept. As this is a second look at
    the same labels, only half the doubt of `accept` is left to it.
    """
    evidence = sure.evidence
    first_stage = try_chain(evidence if unadapted is None else unadapted, Chain())
    attempt = sure if sure.chosen.chain.steps else try_steps(evidence, seed, min(accept, LIKELY))
    names = [*([] if unadapted is None else ["adapt"]), *attempt.taken()]
    refused = [d | {"taken": False, "as_one": True} if d["taken"] else d for d in sure.decisions]
    nothing = replace(sure, chosen=try_chain(evidence, Chain()), decisions=refused)
    if len(names) < 2:
        return nothing, None
    decision = judge(
        f"chain of {', '.join(names[:-1])} and {names[-1]}", first_stage.values, attempt.gained, first_stage,
        evidence.query_labels(), seed, (1 + accept) / 2, counts_map=evidence.target == "both",
        families=evidence.query_families(),
    )  # fmt: skip
    decision["option"] = accept
    if not decision["taken"]:
        return nothing, decision
    joined = [d | {"as_one": True} if d["taken"] else d for d in attempt.decisions]
    return replace(attempt, decisions=joined), decision


def try_steps(evidence: Evidence, seed: int, accept: float, where: str = "") -> Attempt:
    """Tries one chain step after the other, and keeps those that are taken; `where` ends the names in the decisions."""
    labels = evidence.query_labels()
    is_first_half = half_of_labels(labels, seed)
    first_stage = current = try_chain(evidence, Chain())
    gained = first_stage.values
    table = [row(current.chain, current.values)]
    decisions = []
    settings: Settings | None = None
    for name in (*FUSIONS, NEIGHBOURS, PINNED_NEIGHBOURS):
        if current.chain.neighbourhood or (name in FUSIONS and current.chain.pairwise is not None):
            continue  # its kind of step is taken
        if name == PINNED_NEIGHBOURS:  # a half of few labels may move first candidates that the other would keep
            settings = None if settings is None else settings.pinned()
        else:
            settings = settings_for(name, evidence, current, is_first_half)
        if settings is None:
            continue
        if name != PINNED_NEIGHBOURS:  # whose rows are there
            table += [row(chain, values) for chain, values in zip(settings.chains, settings.values, strict=True)]
        decision, values, number = try_step(f"{name}{where}", settings, evidence, first_stage, current, seed, accept)
        decisions.append(decision)
        if number is not None:
            gained = {key: gained[key] + values[key] - current.values[key] for key in gained}
            current = try_chain(evidence, settings.chains[number])
    return Attempt(evidence, is_first_half, current, table, decisions, gained)


def try_step(
    name: str, settings: Settings, evidence: Evidence, first_stage: Trial, current: Trial, seed: int, accept: float
) -> tuple[dict[str, Any], PerQuery, int | None]:
    """The decision about a chain step, its cross-fitted values, and the number of the setting taken, None for none."""
    labels, families = evidence.query_labels(), evidence.query_families()
    is_first_half, everyone = half_of_labels(labels, seed), torch.ones_like(labels, dtype=torch.bool)
    counts_map, is_fusion = evidence.target == "both", isinstance(settings.chains[0].steps[-1], PairwiseStep)
    neighbours_pick = best_that_keeps_first(labels) if counts_map else best
    pick = smallest_best_weight if is_fusion else neighbours_pick
    # Settings that would lose CMC@1 against the chain so far are not chosen where others are there.
    values = cross_fitted_values(settings, current, is_first_half, pick)
    judged = partial(
        judge, name, current.values, first_stage=first_stage, labels=labels, seed=seed, accept=accept,
        counts_map=counts_map, families=families,
    )  # fmt: skip
    decision = judged(values)
    if not decision["taken"]:
        return decision, values, None
    numbers: Sequence[int] = range(len(settings.chains))
    if counts_map and not is_fusion and not may_move_first(current.values, values, labels):
        numbers = settings.pinned_numbers()  # else the best of many, for all labels, moves first candidates by luck
    number = numbers[pick([settings.values[i] for i in numbers], current, everyone)]
    step = settings.chains[number].steps[-1]
    if isinstance(step, ProbabilityStep) and step.pinned and not torch.equal(values["cmc@1"], current.values["cmc@1"]):
        # The halves moved first candidates that the step kept leaves alone: so that step must be sure by itself.
        values = cross_fitted_values(settings.pinned(), current, is_first_half, pick)
        alone = judged(values)
        decision |= {"taken": alone["taken"], "lines": alone["lines"], "pinned_gain": alone["gain"]}
    return decision, values, number if decision["taken"] else None


def without_cmc_loss(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> list[int]:
    """Numbers of the settings with no lower CMC@1 than the first stage on these queries; all, where none has."""
    floor = float(first_stage.values["cmc@1"][rows].mean())
    numbers = [number for number, value in enumerate(values) if float(value["cmc@1"][rows].mean()) >= floor]
    return numbers or list(range(len(values)))


def best(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> int:
    """Number of the setting with the largest objective on these queries, among those without a loss of CMC@1."""
    return max(
        without_cmc_loss(values, first_stage, rows), key=lambda number: float(values[number]["objective"][rows].mean())
    )


def best_that_keeps_first(labels: Int64[Tensor, " query"]) -> Pick:
    """As `best`, among the settings that leave every first candidate or surely gain CMC@1 (`may_move_first`)."""

    def pick(values: Sequence[PerQuery], before: Trial, rows: Bool[Tensor, " query"]) -> int:
        own = {key: column[rows] for key, column in before.values.items()}
        allowed = [
            number
            for number, value in enumerate(values)
            if torch.equal(value["cmc@1"][rows], own["cmc@1"])
            or may_move_first(own, {key: column[rows] for key, column in value.items()}, labels[rows])
        ] or list(range(len(values)))
        return allowed[best([values[number] for number in allowed], before, rows)]

    return pick


def may_move_first(before: PerQuery, after: PerQuery, labels: Int64[Tensor, " query"]) -> bool:
    """Whether CMC@1 gains so surely that neighbours may move first candidates.

    Where some candidates are seen, CMC@1 may not fall in the lists without them either: the neighbours tell seen images
    from others, and first places that are gained so are lost in galleries without seen ones.
    """
    among_unseen = f"cmc@1{AMONG_UNSEEN}"
    if among_unseen in after and float((after[among_unseen] - before[among_unseen]).mean()) < 0:
        return False
    return probability_of_gain(after["cmc@1"] - before["cmc@1"], labels) >= MOVES_FIRST


def smallest_best_weight(values: Sequence[PerQuery], first_stage: Trial, rows: Bool[Tensor, " query"]) -> int:
    """Number of the setting with the largest mAP@10 + CMC@1, among those without a loss of CMC@1.

    A later setting, with a larger weight of the first stage, must be clearly better.
    """
    chosen, chosen_figure = -1, -1.0
    for number in without_cmc_loss(values, first_stage, rows):
        figure = float((values[number]["map@10"][rows] + values[number]["cmc@1"][rows]).mean())
        if chosen < 0 or figure > chosen_figure + CLEARLY_BETTER:
            chosen, chosen_figure = number, figure
    return chosen


def cross_fitted_values(
    settings: Settings, first_stage: Trial, is_first_half: Bool[Tensor, " query"], pick: Pick
) -> PerQuery:
    """Values of each query with all constants from the half of the labels without its own."""
    values = {key: column.clone() for key, column in first_stage.values.items()}
    for is_first in (True, False):
        chosen_on = is_first_half == is_first
        measured = settings.measure(pick(settings.values, first_stage, chosen_on), is_first)
        for key in values:
            values[key][~chosen_on] = measured[key][~chosen_on]
    return values


def row(chain: Chain, values: PerQuery) -> dict[str, Any]:
    """One line of the table of choices."""
    return {"chain": chain.describe(), **{key: float(values[key].mean()) for key in ("map@10", "cmc@1")}}


def log_choice(chosen: Trial, decisions: Sequence[dict[str, Any]]) -> None:
    """One line for each chain step tried and one for the outcome."""
    log_decisions(decisions)
    if not chosen.chain.steps:
        logger.info("no step improves the order on the set-aside labels surely enough: that of the search stays")
    else:
        logger.info("chosen chain: %s", chosen.chain.describe())


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
    labels, families = by_item.query_labels(), by_item.query_families()
    decision = judge("views", values[first], crossed, alone, labels, seed, accept, families=families)
    log_decisions([decision])
    everyone = torch.ones_like(is_first_half)
    taken = others[best(measured, alone, everyone)] if decision["taken"] else first
    return replace(chain, views=taken, chosen_on={**chain.chosen_on, "views": decision})
