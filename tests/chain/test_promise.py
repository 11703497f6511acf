"""A promise is the gain of the steps taken, one after the other, for the first stage of other queries."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from chain_evidence import evidence, evidence_beside_seen

from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.chain.choice import choose
from distributed_rerank.chain.decision import outcome
from distributed_rerank.chain.evidence import AMONG_UNSEEN, Evidence
from distributed_rerank.chain.promise import compare_with_promise, gain_for, lines_of, promise_in_words, promise_of
from distributed_rerank.chain.trials import try_chain
from distributed_rerank.tensors.gain_line import GainLine, gain_line
from distributed_rerank.tensors.knn import nearest

STEPS = (PairwiseStep(top_n=5),)


def line(before: float, gain: float, slope: float, spread: float) -> GainLine:
    return GainLine(before, gain, slope, spread**2, 0.0, 0.0, 1000)


def decided(lines: dict[str, GainLine], is_taken: bool) -> dict[str, object]:
    return {"taken": is_taken, "lines": {key: asdict(found) for key, found in lines.items()}}


def test_two_lines_of_one_sample_give_the_gain_of_both_steps() -> None:
    state = np.random.default_rng(0)
    first = torch.from_numpy(state.uniform(0, 1, 60))
    second = first + 0.4 * (1 - first)
    third = second + 0.1 * torch.from_numpy(state.uniform(0, 1, 60)) * (1 - second)
    lines = [gain_line(a, b, torch.arange(60) // 5) for a, b in ((first, second), (second, third))]
    kept = [found for found in lines if found is not None]
    assert len(kept) == 2
    assert gain_for(kept, float(first.mean())).mean == pytest.approx(float((third - first).mean()))


def test_a_worse_first_stage_is_promised_more_and_no_value_leaves_its_range() -> None:
    lines = [line(0.7, 0.2, -0.5, 0.02), line(0.9, 0.05, -0.5, 0.01)]
    at_home, worse, best = (gain_for(lines, before) for before in (0.7, 0.5, 1.0))
    assert at_home.mean == pytest.approx(0.25)
    assert worse.mean == pytest.approx(0.3 + 0.05 + 0.5 * 0.1)
    assert best.mean == 0
    assert best.high <= 0
    assert gain_for([line(0.7, -0.2, 1.0, 0.02)], 0.1).mean == pytest.approx(-0.1), "nothing falls below 0"
    # Both spreads, that of the first step halved by the second's slope; 1.96 of the normal distribution.
    assert at_home.high - at_home.mean == pytest.approx(1.962 * np.hypot(0.5 * 0.02, 0.01), rel=1e-3)


def test_what_the_lines_move_is_an_error_of_the_promise() -> None:
    """An extractor that knows the labels set aside has a worse first stage on others, and no more is gained there."""
    lines = [line(0.7, 0.2, -0.5, 0.02), line(0.9, 0.05, -0.5, 0.01)]
    moved = 0.5 * 0.2 + 0.5 * 0.1  # the first step starts 0.2 below its own queries, the second 0.1
    for before, of_moved in ((0.5, moved), (0.7, 0.0)):
        promised = gain_for(lines, before)
        assert promised.mean - promised.low == pytest.approx(
            np.hypot(1.962 * np.hypot(0.5 * 0.02, 0.01), of_moved), rel=1e-3
        )
    assert gain_for(lines, 0.5).low < 0.25, "the gain of the labels set aside as it is"


def test_steps_not_taken_promise_nothing() -> None:
    taken, refused = {"map@10": line(0.5, 0.2, 0.0, 0.01)}, {"map@10": line(0.5, 0.9, 0.0, 0.01)}
    chain = Chain(
        STEPS, {"adapt": decided(refused, False), "decisions": [decided(taken, True), decided(refused, False)]}
    )
    promise = promise_of(chain)
    assert lines_of(promise) == {"map@10": [taken["map@10"]]}
    assert "mAP@10 +0.2000 [" in promise_in_words(promise)
    assert "where it has 0.5000" in promise_in_words(promise)
    nothing = promise_of(Chain((), {"decisions": [decided(refused, False)]}))
    assert nothing == {}
    assert promise_in_words(nothing) == ""


@pytest.mark.parametrize(("shown", "outcome"), [(0.19, "kept"), (0.25, "more"), (0.15, "less")])
def test_shown_gain_is_compared_within_both_intervals(shown: float, outcome: str) -> None:
    chain = Chain(STEPS, {"decisions": [decided({"map@10": line(0.5, 0.2, 0.0, 0.01)}, True)]})
    chain = replace(chain, chosen_on={**chain.chosen_on, "promise": promise_of(chain)})
    difference = {"map@10": {"mean": shown, "ci95": [shown - 0.02, shown + 0.02]}}
    found = compare_with_promise(chain, {"map@10": 0.4}, difference)["map@10"]
    assert found["outcome"] == outcome
    assert found["promised"] == pytest.approx(0.2)
    # The error of the promise, 1.962 x 0.01, and that of what is shown.
    assert found["ci95"] == pytest.approx([0.2 - np.hypot(0.01962, 0.02), 0.2 + np.hypot(0.01962, 0.02)], abs=1e-4)
    assert found["shown"] == shown
    # Steps changed by hand are another chain: nobody promised anything of it.
    assert compare_with_promise(replace(chain, steps=(PairwiseStep(top_n=6),)), {"map@10": 0.4}, difference) == {}
    assert compare_with_promise(Chain(STEPS), {"map@10": 0.4}, difference) == {}


@pytest.mark.parametrize(("spread", "others"), [(0.6, 0.7), (0.7, 0.8), (0.8, 0.7)])
def test_chosen_chain_keeps_its_promise_on_new_labels_of_another_difficulty(spread: float, others: float) -> None:
    """Points that lie further apart, or less, than those of the choice; labels and logits are drawn anew."""
    chain = choose(evidence(spread, 2.0))
    lines = lines_of(promise_of(chain))["map@10"]
    changes, moved = [], []
    for seed in range(100, 106):
        fresh = evidence(others, 2.0, seed=seed)
        before, after = (try_chain(fresh, steps).figures()["map@10"] for steps in (Chain(), chain))
        promised = gain_for(lines, before)
        changes.append(promised.low - 0.02 <= after - before <= promised.high + 0.02)
        moved.append(abs(after - before - promised.mean) < abs(after - before - gain_for(lines, lines[0].before).mean))
    assert sum(changes) >= 5, "the intervals are of 95 %"
    assert sum(moved) >= 5, "nearer than the gain of the labels set aside as it is"


def test_candidates_that_the_extractor_has_seen_are_no_part_of_the_promise() -> None:
    """The logits send seen candidates back and know a little of the matches: only the second helps other queries."""
    known = evidence_beside_seen(truth_weight=0.5, noise=0.0)
    chain = choose(known)
    assert chain.pairwise is not None
    promise = promise_of(chain)
    assert "among photos that the extractor has not seen" in promise_in_words(promise)
    first = lines_of(promise)["map@10"][0]
    # The same queries in a gallery without the seen images, searched anew.
    own = torch.arange(int((known.labels >= 0).sum()))
    own_lists = nearest(known.embeddings[own], known.embeddings[own], query_items=own, gallery_items=own, n_items=60)
    alone = Evidence(own_lists, known.labels[own], known.n_relevant[own])
    before = float(alone.per_query(own_lists)["map@10"].mean())
    assert first.before == pytest.approx(before)
    decision = next(decision for decision in chain.chosen_on["decisions"] if decision["step"] == "pairwise")
    assert first.gain == pytest.approx(decision["gain"][f"map@10{AMONG_UNSEEN}"]["mean"])
    assert 0 < first.gain < decision["gain"]["map@10"]["mean"] / 2


def test_a_step_that_pins_first_candidates_promises_no_change_of_cmc() -> None:
    """Behind a seen first candidate the first unseen one has changed, which no other gallery can show."""
    lines = {
        "cmc@1": line(0.9, 0.0, 0.0, 0.0),
        f"cmc@1{AMONG_UNSEEN}": line(0.95, -0.002, 0.1, 0.001),
        "map@10": line(0.7, 0.1, 0.0, 0.01),
        f"map@10{AMONG_UNSEEN}": line(0.8, 0.06, -0.2, 0.01),
    }
    promise = promise_of(Chain(STEPS, {"decisions": [decided(lines, True)]}))
    assert lines_of(promise) == {
        "cmc@1": [line(0.95, 0.0, 0.0, 0.0)], "map@10": [lines[f"map@10{AMONG_UNSEEN}"]]
    }  # fmt: skip
    assert "CMC@1 +0.0000 [+0.0000, +0.0000] where it has 0.9500" in promise_in_words(promise)


def test_a_model_that_only_tells_seen_from_unseen_candidates_is_not_taken() -> None:
    chain = choose(evidence_beside_seen(truth_weight=0.0, noise=0.4))
    decision = next(decision for decision in chain.chosen_on["decisions"] if decision["step"] == "pairwise")
    assert decision["gain"]["map@10"]["mean"] > 0.1
    assert decision["probability"] > decision["accept"]
    assert decision["gain"][f"map@10{AMONG_UNSEEN}"]["mean"] < 0
    assert not decision["taken"]
    assert outcome(decision) == "not taken, for mAP@10 among unseen photos would fall"
