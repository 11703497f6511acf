"""A decision weighs a gain by its labels and the room that is left, and says why a step is taken or not."""

from dataclasses import asdict

import pytest
import torch
from chain_evidence import evidence

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.decision import judge, outcome
from distributed_rerank.chain.trials import Trial
from distributed_rerank.tensors.gain_line import gain_line


@pytest.mark.parametrize(
    ("is_taken", "probability", "mean", "said"),
    [
        (True, 0.995, 0.1, "taken, for it gains with a probability of 99.5% (--accept 0.99)"),
        (False, 0.995, 0.1, "not taken, for mAP@10 or CMC@1 would fall"),
        (False, 0.6, 0.004, "not taken, for mAP@10 + 2 CMC@1 does not rise by 0.005"),
        (
            False,
            0.97,
            0.1,
            "not taken, for it gains with a probability of 97.0% only, where --accept asks for 99%; with "
            "the same gain about 13 labels would do instead of 8",
        ),
        (
            False,
            0.98996,
            0.1,
            "not taken, for it gains with a probability of 98.9% only, where --accept asks for 99%; with "
            "the same gain about 9 labels would do instead of 8",
        ),
    ],
)
def test_a_decision_says_why(is_taken: bool, probability: float, mean: float, said: str) -> None:
    gain = {"objective": {"mean": mean}}
    decision = {"taken": is_taken, "probability": probability, "accept": 0.99, "gain": gain, "n_labels": 8}
    assert outcome(decision) == said


def test_a_decision_against_a_step_says_how_many_labels_would_do() -> None:
    decision = {
        "taken": False,
        "probability": 0.95,
        "accept": 0.99,
        "gain": {"objective": {"mean": 0.1}},
        "n_labels": 8,
    }
    assert "probability of 95.0% only" in outcome(decision)
    assert "about 17 labels would do instead of 8" in outcome(decision)  # 8 * (2.326 / 1.645) ** 2 = 16.0...


@pytest.mark.parametrize(
    ("n_labels", "gain", "is_taken"),
    [(1, 0.3, False), (2, 0.05, False), (2, 0.3, True), (4, 0.05, False), (8, 0.1, True)],
)
def test_a_clear_gain_of_few_labels_can_be_taken(n_labels: int, gain: float, is_taken: bool) -> None:
    labels = torch.arange(n_labels).repeat_interleave(6)
    before = {key: torch.full((len(labels),), 0.5, dtype=torch.float64) for key in ("map@10", "cmc@1", "objective")}
    after = {key: column + gain + 0.05 * (labels % 3) for key, column in before.items()}
    decision = judge("pairwise", before, after, Trial(Chain(), before, evidence(1.0, 1.0).lists), labels, 0, 0.99)
    assert decision["taken"] is is_taken


@pytest.mark.parametrize(("before", "is_taken"), [(0.985, True), (0.5, False), (1.0, False)])
def test_a_small_gain_counts_where_little_room_is_left(before: float, is_taken: bool) -> None:
    labels = torch.arange(10).repeat_interleave(6)
    gain = min(0.011, 1 - before) * (1 + 0.2 * (labels % 3 - 1)).double()
    values = {key: torch.full((60,), 1.0, dtype=torch.float64) for key in ("map@10", "cmc@1", "objective")}
    values |= {"map@10": torch.full((60,), before).double(), "objective": torch.full((60,), before + 2).double()}
    after = values | {key: values[key] + gain for key in ("map@10", "objective")}
    trial = Trial(Chain(), values, evidence(1.0, 1.0).lists)
    assert judge("neighbours", values, after, trial, labels, 0, 0.995, counts_map=True)["taken"] is is_taken


def test_a_promise_is_as_uncertain_as_families_of_labels_differ() -> None:
    """Ten families of three labels that gain the same: as sure as ten labels, whatever the thirty labels say."""
    labels = torch.arange(30).repeat_interleave(5)
    families = labels // 3
    before = {key: torch.linspace(0.2, 0.6, 150).double() for key in ("map@10", "cmc@1", "objective")}
    after = {key: column + 0.1 + 0.02 * (families % 4) for key, column in before.items()}
    trial = Trial(Chain(), before, evidence(1.0, 1.0).lists)
    apart, together = (judge("adapt", before, after, trial, labels, 0, 0.99, families=by) for by in (None, families))
    assert together["lines"]["map@10"] == asdict(gain_line(before["map@10"], after["map@10"], families))
    assert apart["lines"]["map@10"] == asdict(gain_line(before["map@10"], after["map@10"], labels))
    ratio = together["lines"]["map@10"]["gain_variance"] / apart["lines"]["map@10"]["gain_variance"]
    assert 2 < ratio < 4
    assert {**apart, "lines": 0} == {**together, "lines": 0}
