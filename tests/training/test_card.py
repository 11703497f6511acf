"""The model card says on which labels a chain was chosen, and why these are evidence."""

from typing import Any

import pytest

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.decision import ON_ALL_LABELS
from distributed_rerank.training.card import worth_section


def decision(step: str, *, taken: bool) -> dict[str, Any]:
    gain = {"mean": 0.1, "ci95": [0.05, 0.15]}
    return {"step": step, "taken": taken, "gain": {"map@10": gain, "cmc@1": gain}}


@pytest.mark.parametrize("is_on_all", [False, True])
def test_card_claims_unseen_labels_only_for_steps_that_were_taken_on_them(is_on_all: bool) -> None:
    """A model that is trained once has seen most labels that its neighbours are judged on, and they do not need it."""
    figures = {"map@10": 0.5, "cmc@1": 0.6}
    steps = [decision("neighbours", taken=not is_on_all)]
    steps += [decision(f"neighbours{ON_ALL_LABELS}", taken=True)] if is_on_all else []
    on = {"n_queries": 1593, "n_labels": 40, "first_stage": figures, "chosen": figures, "decisions": steps}
    card = worth_section(Chain(chosen_on=on))
    assert ("1,593 images of 40 train labels that the measured weights have not seen:" in card) is not is_on_all
    assert ("1,593 images of 40 train labels, with a chain that does without the weights:" in card) is is_on_all
    assert (
        "| gain of the neighbours, on all train labels step, taken | +0.1000 [+0.0500, +0.1500] |" in card
    ) is is_on_all


def test_card_names_steps_that_were_judged_as_one() -> None:
    figures = {"map@10": 0.5, "cmc@1": 0.6}
    on = {"n_queries": 160, "n_labels": 40, "first_stage": figures, "chosen": figures}
    steps = [decision("pairwise", taken=True), decision("neighbours", taken=True)]
    card = worth_section(
        Chain(
            chosen_on={**on, "decisions": steps, "together": decision("chain of pairwise and neighbours", taken=True)}
        )
    )
    assert "| gain of the pairwise step, taken |" in card
    assert "| gain of the chain of pairwise and neighbours, taken |" in card
