"""A choice stays away from noise, takes what helps, and rests on labels that its constants have not seen."""

import json
from dataclasses import replace

import pytest
import torch
from chain_evidence import N_LABELS, evidence
from torch import Tensor

from distributed_rerank.chain.chain import Chain, NeighbourhoodStep, PairwiseStep, QueryExpansionStep
from distributed_rerank.chain.choice import best, best_that_keeps_first, choose, may_move_first, try_step
from distributed_rerank.chain.decision import ON_ALL_LABELS, WITHOUT_ADAPTER, outcome
from distributed_rerank.chain.evidence import Evidence, half_of_labels
from distributed_rerank.chain.probability import probabilities
from distributed_rerank.chain.promise import lines_of, promise_of
from distributed_rerank.chain.settings import Settings, fusion_figure, fusion_trials, neighbour_settings
from distributed_rerank.chain.trials import Trial, try_chain
from distributed_rerank.tensors.calibration import expected_calibration_error
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.metrics import count_relevant


def test_choice_on_shuffled_labels_does_no_harm_to_others() -> None:
    chains = [choose(evidence(1.0, None, is_shuffled=True, seed=seed), seed) for seed in range(2)]
    assert all(chain.pairwise is None for chain in chains)
    assert any(chain.steps == () for chain in chains)
    for seed, chain in enumerate(chains):
        fresh = evidence(1.0, None, is_shuffled=True, seed=100 + seed)
        change = try_chain(fresh, chain).figures()["map@10"] - try_chain(fresh, Chain()).figures()["map@10"]
        assert change >= -0.003


def test_choice_with_a_perfect_first_stage_is_the_first_stage() -> None:
    assert choose(evidence(0.01, 1.0)).steps == ()


def test_choice_takes_a_pairwise_model_that_helps() -> None:
    known = evidence(1.5, 2.0)
    chain = choose(known)
    assert chain.pairwise is not None
    assert chain.chosen_on["chosen"]["map@10"] > chain.chosen_on["first_stage"]["map@10"] + 0.05
    assert chain.chosen_on["n_labels"] == N_LABELS
    json.dumps(chain.chosen_on, allow_nan=False)


def test_every_line_of_a_chosen_chain_is_by_family() -> None:
    known = evidence(1.5, 2.0)
    chain = choose(replace(known, families=known.labels // 3))
    lines = [decision["lines"]["map@10"] for decision in chain.chosen_on["decisions"]]
    assert len(lines) >= 2
    assert {line["n_clusters"] for line in lines} == {10}
    assert {d["lines"]["map@10"]["n_clusters"] for d in choose(known).chosen_on["decisions"]} == {30}


def test_fewer_than_five_families_are_too_few_to_tell_how_they_differ() -> None:
    known = evidence(1.5, 2.0)
    assert torch.equal(known.query_families(), known.labels)
    of_four, of_five = (replace(known, families=known.labels % n) for n in (4, 5))
    assert torch.equal(of_four.query_families(), known.labels)
    assert torch.equal(of_five.query_families(), known.labels % 5)


def test_the_target_decides_what_is_maximised() -> None:
    known = evidence(1.5, 2.0)
    values = {target: replace(known, target=target).per_query(known.lists) for target in ("both", "cmc@1", "mrr")}
    assert torch.equal(values["cmc@1"]["objective"], values["both"]["cmc@1"])
    assert torch.equal(values["both"]["objective"], values["both"]["map@10"] + 2 * values["both"]["cmc@1"])
    assert torch.equal(values["mrr"]["objective"], values["mrr"]["mrr"])


def test_a_pinned_step_keeps_the_first_place_of_the_step_before() -> None:
    known = evidence(1.5, 2.0)
    pairwise = PairwiseStep(30, "fuse", 0.0)
    before = try_chain(known, Chain((pairwise,)))
    pinned = try_chain(known, Chain((pairwise, NeighbourhoodStep(1.0, 0.0, weight=0.3, pinned=1))))
    free = try_chain(known, Chain((pairwise, NeighbourhoodStep(1.0, 0.0, weight=0.3))))
    assert torch.equal(pinned.values["cmc@1"], before.values["cmc@1"])
    assert torch.equal(pinned.lists.items[:, 0], before.lists.items[:, 0])
    assert not torch.equal(pinned.lists.items, before.lists.items)
    assert not torch.equal(free.lists.items[:, 0], before.lists.items[:, 0])


def test_a_model_that_errs_on_first_places_orders_the_others() -> None:
    known = evidence(1.5, 2.0)
    assert known.logits is not None
    # A right candidate stands first in every list that has one, and distances say nothing: logits can only lose it.
    is_wrong = known.labels[known.lists.items] != known.labels[:, None]
    first = is_wrong.to(torch.uint8).argmin(dim=1, keepdim=True)
    places = torch.arange(is_wrong.shape[1]).expand(is_wrong.shape).clone()
    places.scatter_(1, first, -1)
    order = places.argsort(dim=1)
    lists = replace(
        known.lists, items=known.lists.items.gather(1, order), distances=torch.ones_like(known.lists.distances)
    )
    known = replace(known, lists=lists, logits=known.logits.gather(1, order))
    chain = choose(known)
    assert [decision["taken"] for decision in chain.chosen_on["decisions"]][:2] == [False, True]
    assert chain.pairwise is not None
    assert chain.pairwise.pinned == 1
    before, after = (try_chain(known, part) for part in (Chain(), Chain(chain.steps[:1])))
    assert torch.equal(after.lists.items[:, 0], before.lists.items[:, 0])
    assert after.figures()["map@10"] > before.figures()["map@10"] + 0.02


def test_where_no_first_place_has_changed_the_first_candidate_is_pinned() -> None:
    known = replace(evidence(0.6, 1.0), logits=None)
    # Every list begins with a right candidate that is much nearer than the rest: CMC@1 is 1 and says nothing of others.
    is_wrong = known.labels[known.lists.items] != known.labels[:, None]
    order = torch.arange(is_wrong.shape[1]).expand(is_wrong.shape).clone()
    order.scatter_(1, is_wrong.to(torch.uint8).argmin(dim=1, keepdim=True), -1)
    items = known.lists.items.gather(1, order.argsort(dim=1))
    distances = known.lists.distances.clone()
    distances[:, 0] = 0.0
    known = replace(known, lists=replace(known.lists, items=items, distances=distances))
    assert try_chain(known, Chain()).figures()["cmc@1"] == 1.0
    (step,) = choose(known).steps
    assert step.pinned == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_choice_leaves_a_pairwise_model_of_noise_out() -> None:
    chain = choose(evidence(1.0, None))
    assert chain.pairwise is None


def test_choice_is_the_same_for_logits_of_another_scale() -> None:
    known = evidence(1.5, 2.0)
    assert known.logits is not None
    scaled = Evidence(known.lists, known.labels, known.n_relevant, known.logits * 100, known.embeddings)
    first, second = choose(known), choose(scaled)
    assert first.pairwise is not None
    assert second.pairwise is not None
    assert first.pairwise.weight == second.pairwise.weight
    assert second.pairwise.temperature == pytest.approx(100 * first.pairwise.temperature, rel=1e-4)


def test_fusion_figure_of_true_logits_is_that_of_a_perfect_head() -> None:
    known = evidence(1.5, 0.0)
    found = first_hits(known)
    assert fusion_figure(known)["cmc@1"] == pytest.approx(float(found.double().mean()))


def test_choice_takes_neighbours_where_labels_are_clusters_and_logits_are_absent() -> None:
    known = replace(evidence(0.7, None), logits=None)
    chain = choose(known)
    assert chain.pairwise is None
    assert len(chain.neighbourhood) == 1
    assert chain.chosen_on["chosen"]["map@10"] > chain.chosen_on["first_stage"]["map@10"] + 0.03
    tried = {line["chain"].split(" -> ")[-1].split("(")[0] for line in chain.chosen_on["table"]}
    assert tried == {"first stage", "neighbourhood", "query_expansion"}


def test_settings_as_measured_while_choosing_are_the_steps_as_applied() -> None:
    known = evidence(1.5, 2.0)
    before = fusion_trials(known)[0]
    is_first = half_of_labels(known.query_labels(), 0)
    settings = neighbour_settings(known, before, is_first)
    assert settings is not None
    for kind in (NeighbourhoodStep, QueryExpansionStep):
        number = next(n for n, chain in enumerate(settings.chains) if isinstance(chain.steps[-1], kind))
        curves = [settings.measure(number, side) for side in (True, False)]
        for key, values in settings.values[number].items():
            assert torch.equal(values, torch.where(is_first, curves[0][key], curves[1][key]))
        applied = try_chain(known, settings.chains[number])
        assert applied.figures()["map@10"] == pytest.approx(float(settings.values[number]["map@10"].mean()), abs=0.02)


def test_what_is_measured_with_the_curve_of_one_half_has_not_seen_the_other_halfs_labels() -> None:
    known = evidence(1.5, 2.0)
    is_first = half_of_labels(known.query_labels(), 0)
    strangers = known.labels.clone()
    generator = torch.Generator().manual_seed(1)
    others = (~is_first).nonzero().squeeze(1)
    strangers[others] = strangers[others][torch.randperm(len(others), generator=generator)]
    found = []
    for labels in (known.labels, strangers):
        changed = replace(known, labels=labels)
        settings = neighbour_settings(changed, fusion_trials(changed)[0], is_first)
        assert settings is not None
        found.append([settings.measure(number, True)["map@10"][is_first] for number in (0, 20, 40)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_calibration_makes_probabilities_of_fresh_labels_honest() -> None:
    known = evidence(1.5, 2.0)
    assert known.logits is not None
    chain = choose(replace(known, logits=3 * known.logits - 12))
    assert chain.calibration["ece"] < 0.05 < chain.calibration["ece_raw"]
    fresh = evidence(1.5, 2.0, seed=1)
    assert fresh.logits is not None
    trial = try_chain(replace(fresh, logits=3 * fresh.logits - 12), Chain(chain.steps))
    distances, is_match = fresh.labelled_pairs(trial.lists, fresh.logits.shape[1])
    found = probabilities(chain, distances)
    assert found is not None
    assert expected_calibration_error(found, is_match) < 0.06
    assert probabilities(Chain(chain.steps), distances) is None


def first_hits(known: Evidence) -> Tensor:
    """Whether any relevant candidate was retrieved at all: what a perfect head puts first."""
    return (known.labels[known.lists.items] == known.labels[:, None]).any(dim=1)


@pytest.mark.parametrize(("gain_of_cmc", "picked"), [(0.0, 1), (0.05, 0)])
def test_first_candidate_moves_only_where_cmc_surely_gains(gain_of_cmc: float, picked: int) -> None:
    """40 labels of 20 queries: a setting that moves first candidates, good at mAP@10, and one that pins them."""
    labels = torch.arange(40).repeat_interleave(20)
    before = torch.rand(len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moves = torch.tensor([1.0, -1.0, 0.0, 0.0] * 200, dtype=torch.float64) + gain_of_cmc

    def values(cmc: torch.Tensor, gain: float) -> dict[str, torch.Tensor]:
        return {"map@10": before + gain, "cmc@1": cmc, "objective": before + gain + 2 * cmc}

    so_far = Trial(Chain(), values(before, 0.0), evidence(1.0, None).lists)
    settings = [values(before + moves, 0.3), values(before, 0.2)]
    everyone = torch.ones(len(labels), dtype=torch.bool)
    assert best(settings, so_far, everyone) == 0
    assert best_that_keeps_first(labels)(settings, so_far, everyone) == picked


def test_neighbours_that_may_not_move_the_first_candidate_are_tried_behind_it() -> None:
    """With few labels a half moves first candidates by chance, and the step that keeps them would go unseen."""
    known = replace(evidence(1.5, None, seed=2), logits=None)
    chain = choose(known, 2)
    free, pinned = chain.chosen_on["decisions"]
    assert (free["step"], free["taken"]) == ("neighbours", False)
    assert (pinned["step"], pinned["taken"]) == ("neighbours behind the first candidate", True)
    assert chain.neighbourhood[0].pinned == 1  # pyright: ignore[reportAttributeAccessIssue]
    fresh = replace(evidence(1.5, None, seed=102), logits=None)
    before, after = (try_chain(fresh, each).figures() for each in (Chain(), chain))
    assert after["cmc@1"] == before["cmc@1"]
    assert after["map@10"] > before["map@10"]


@pytest.mark.parametrize(("seed", "of_halves", "pinned"), [(12, 0.0, 1), (5, 0.0067, 1), (9, 0.0933, 0)])
def test_first_candidates_move_only_where_the_halves_surely_gain(seed: int, of_halves: float, pinned: int) -> None:
    """All labels together find a setting of luck among many; what a half chooses shows little on the other."""
    known = replace(evidence(0.8, None, seed=seed), logits=None)
    chain = choose(known, seed)
    (decision,) = chain.chosen_on["decisions"]
    assert (decision["step"], decision["taken"]) == ("neighbours", True)
    assert decision["gain"]["cmc@1"]["mean"] == pytest.approx(of_halves, abs=1e-4)
    step = chain.neighbourhood[0]
    assert step.pinned == pinned  # pyright: ignore[reportAttributeAccessIssue]
    before, after, free = (
        try_chain(known, each).figures() for each in (Chain(), chain, Chain((replace(step, pinned=0),)))
    )
    assert before["cmc@1"] < free["cmc@1"], "that is what all labels together would have chosen"
    assert (after["cmc@1"] == before["cmc@1"]) == bool(pinned)
    assert after["map@10"] > before["map@10"] + 0.02
    # A first candidate that stays is promised no gain, although the halves moved it.
    lines = lines_of(promise_of(chain))
    assert lines["cmc@1"][0].gain == pytest.approx(0.0 if pinned else of_halves, abs=1e-4)
    assert lines["map@10"][0].gain > 0.02


def few_labels(seed: int, *, is_shuffled: bool = False) -> tuple[Evidence, Evidence]:
    """Six labels of six items: halves that are searched apart, with logits of noise, and all in one gallery."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(6).repeat_interleave(6)
    points = torch.randn(6, 12, generator=generator)[labels] + 0.85 * torch.randn(36, 12, generator=generator)
    if is_shuffled:
        labels = labels[torch.randperm(36, generator=generator)]
    items = torch.arange(36)
    n_relevant = count_relevant(items, labels, None, items, labels, None)
    halves = torch.isin(labels, labels.unique()[::2]).long()
    logits = torch.randn(36, 17, generator=generator)

    def among(sequences: Tensor) -> CandidateLists:  # what has the query's own sequence is left out: the other half
        found = nearest(
            points, points, query_items=items, gallery_items=items, n_items=35,
            query_sequences=1 - sequences, gallery_sequences=sequences,
        )  # fmt: skip
        return found.padded(35)

    apart = among(halves)
    parts = Evidence(apart.first(17), labels, n_relevant, logits, points)
    return parts, Evidence(among(torch.full((36,), -1)), labels, n_relevant, None, points)


def test_few_labels_are_chosen_on_in_one_gallery_where_their_halves_show_too_little() -> None:
    apart, all_labels = few_labels(0)
    alone, together = choose(apart), choose(apart, all_labels=all_labels)
    assert alone.steps == ()
    assert len(together.steps) == 1
    *of_halves, last = together.chosen_on["decisions"]
    assert of_halves[: len(alone.chosen_on["decisions"])] == alone.chosen_on["decisions"]
    assert (last["taken"], last["step"].endswith(ON_ALL_LABELS)) == (True, True)
    # The figures are those of the gallery that the step was chosen in.
    in_one_gallery = {key: float(values.mean()) for key, values in all_labels.per_query(all_labels.lists).items()}
    assert together.chosen_on["first_stage"] == {key: in_one_gallery[key] for key in ("map@10", "cmc@1")}
    assert together.chosen_on["chosen"] == try_chain(all_labels, together).figures()
    _, fresh = few_labels(100)
    before, after = (try_chain(fresh, chain).figures() for chain in (Chain(), together))
    assert after["map@10"] > before["map@10"]


def test_one_gallery_is_not_asked_where_the_halves_show_enough() -> None:
    known, (_, all_labels) = evidence(1.5, 2.0), few_labels(0)
    assert choose(known, all_labels=all_labels).chosen_on == choose(known).chosen_on


def test_one_gallery_of_shuffled_labels_adds_no_step() -> None:
    for seed in range(4):
        apart, all_labels = few_labels(seed, is_shuffled=True)
        assert choose(apart, seed, all_labels=all_labels).steps == ()


def test_steps_that_are_likely_alone_and_sure_as_one_are_taken_as_one() -> None:
    known = evidence(2.0, 7.0, seed=4)
    chain = choose(known, 4)
    on = chain.chosen_on
    assert [on["together"][key] for key in ("step", "taken")] == [
        "chain of pairwise and neighbours behind the first candidate", True,
    ]  # fmt: skip
    taken = [decision for decision in on["decisions"] if decision["taken"]]
    assert [type(step) for step in chain.steps] == [PairwiseStep, QueryExpansionStep]
    assert len(taken) == 2
    assert all(0.9 <= decision["probability"] < 0.995 < 0.9975 <= on["together"]["probability"] for decision in taken)
    assert all(outcome(decision).startswith("judged as one with other steps") for decision in taken)
    assert outcome(on["together"]) == (
        "taken, for it gains with a probability of 100.0% (--accept 0.995 asks for 99.75% of steps as one)"
    )
    # The gain as one is that of the steps one after the other, and so is what is promised.
    for key in ("map@10", "cmc@1"):
        together = on["together"]["gain"][key]["mean"]
        assert together == pytest.approx(sum(decision["gain"][key]["mean"] for decision in taken), abs=1e-9)
    assert [line.gain for line in lines_of(promise_of(chain))["map@10"]] == [on["together"]["lines"]["map@10"]["gain"]]
    fresh = evidence(2.0, 7.0, seed=104)
    before, after = (try_chain(fresh, each).figures() for each in (Chain(), chain))
    assert after["map@10"] > before["map@10"]
    assert after["cmc@1"] > before["cmc@1"]


def test_steps_that_are_not_sure_as_one_are_left_out() -> None:
    chain = choose(evidence(2.0, 7.0, seed=4), 4, accept=0.9999)
    assert chain.steps == ()
    assert chain.chosen_on["together"]["taken"] is False
    assert not any(decision["taken"] for decision in chain.chosen_on["decisions"])
    said = outcome(chain.chosen_on["together"])
    assert "99.9% only, where --accept asks for 99.995% of steps as one; with the same gain about" in said
    assert promise_of(chain) == {}


def test_no_chain_is_judged_where_a_step_is_sure_or_only_one_is_likely() -> None:
    assert "together" not in choose(evidence(1.5, 2.0)).chosen_on
    known = evidence(2.0, 7.0, seed=6)
    decisions = choose(known, 6).chosen_on["decisions"]
    assert [0.9 < decision["probability"] < 0.995 for decision in decisions] == [False, True]
    assert "together" not in choose(known, 6).chosen_on


def test_steps_behind_an_adapter_that_is_only_likely_are_taken_with_it_or_not_at_all() -> None:
    known, worse = evidence(1.0, 2.0), replace(evidence(1.5, None), logits=None)
    chain = choose(known, unadapted=worse)
    on = chain.chosen_on
    assert chain.is_judged_as_one
    assert on["together"]["step"].startswith("chain of adapt, pairwise")
    gain_of_steps = sum(d["gain"]["map@10"]["mean"] for d in on["decisions"] if d["taken"])
    of_adapter = try_chain(known, Chain()).figures()["map@10"] - try_chain(worse, Chain()).figures()["map@10"]
    assert on["together"]["gain"]["map@10"]["mean"] == pytest.approx(of_adapter + gain_of_steps, abs=1e-9)
    # Where the adapter does not help, its chain is refused, however sure the steps behind it are.
    better = replace(evidence(0.1, None), logits=None)
    refused = choose(known, unadapted=better)
    assert refused.pairwise is None
    assert not refused.is_judged_as_one
    steps = [decision["step"] for decision in refused.chosen_on["decisions"]]
    assert steps[0] == "pairwise"
    assert any(step.endswith(WITHOUT_ADAPTER) for step in steps)
    assert not any(d["taken"] for d in refused.chosen_on["decisions"] if not d["step"].endswith(WITHOUT_ADAPTER))
    own = {key: float(values.mean()) for key, values in better.per_query(better.lists).items()}
    assert refused.chosen_on["first_stage"] == {key: own[key] for key in ("map@10", "cmc@1")}


@pytest.mark.parametrize(("of_unseen", "is_sure"), [(0.2, True), (0.001, True), (-0.001, False), (-0.2, False)])
def test_first_candidates_move_only_where_cmc_does_not_fall_among_unseen_ones(of_unseen: float, is_sure: bool) -> None:
    labels = torch.arange(40).repeat_interleave(20)
    noise = torch.rand((2, len(labels)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = {"cmc@1": noise[0], "cmc@1 among unseen": noise[0]}
    moves = 0.1 * (noise[1] - 0.5)
    after = {"cmc@1": noise[0] + 0.2 + moves, "cmc@1 among unseen": noise[0] + of_unseen}
    assert may_move_first(before, after, labels) is is_sure
    assert may_move_first({"cmc@1": noise[0]}, {"cmc@1": after["cmc@1"]}, labels)


@pytest.mark.parametrize(("of_unseen", "picked"), [(0.01, 0), (-0.01, 1)])
def test_neighbours_that_lose_first_places_among_unseen_ones_keep_the_first_candidate(
    of_unseen: float, picked: int
) -> None:
    labels = torch.arange(40).repeat_interleave(20)
    before = torch.rand(len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def values(of_map: float, of_cmc: float, of_unseen: float) -> dict[str, torch.Tensor]:
        gains = {"map@10": of_map, "cmc@1": of_cmc, "cmc@1 among unseen": of_unseen, "objective": of_map + 2 * of_cmc}
        return {key: before + gain for key, gain in gains.items()}

    so_far = Trial(Chain(), values(0.0, 0.0, 0.0), evidence(1.0, None).lists)
    settings = [values(0.1, 0.1, of_unseen), values(0.1, 0.0, 0.0)]
    everyone = torch.ones(len(labels), dtype=torch.bool)
    assert best_that_keeps_first(labels)(settings, so_far, everyone) == picked


@pytest.mark.parametrize(("of_pinned", "is_taken"), [(0.0, False), (0.1, True)])
def test_a_step_behind_the_first_candidate_must_be_sure_by_itself(of_pinned: float, is_taken: bool) -> None:
    """Neighbours that surely gain mAP@10, and CMC@1 on the half chosen on only, are kept behind the first candidate."""
    known = evidence(1.0, None)
    before = try_chain(known, Chain())
    swing = 0.5 * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64).repeat(N_LABELS)

    def gaining(of_map: float, of_cmc: Tensor | float) -> dict[str, Tensor]:
        after = {"map@10": before.values["map@10"] + of_map, "cmc@1": before.values["cmc@1"] + of_cmc}
        return {**after, "objective": after["map@10"] + 2 * after["cmc@1"]}

    shown = [gaining(0.2, swing), gaining(of_pinned, 0.0)]
    steps = [NeighbourhoodStep(1.0, 0.0, pinned=pinned) for pinned in (0, 1)]
    settings = Settings(
        [Chain((step,)) for step in steps], [gaining(0.2, 0.2), shown[1]], lambda number, is_first: shown[number]
    )
    decision, values, number = try_step("neighbours", settings, known, before, before, 0, 0.995)
    assert decision["gain"]["map@10"]["mean"] == pytest.approx(0.2)
    assert decision["taken"] is is_taken
    assert number == (1 if is_taken else None)
    assert torch.equal(values["cmc@1"], before.values["cmc@1"])
    assert outcome(decision).startswith("taken" if is_taken else "not taken, for CMC@1 does not surely rise")
