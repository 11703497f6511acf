"""The outcome in words."""

import pytest
from report_examples import baselines_of, made_up_queries, metrics_of

from distributed_rerank.report.verdict import verdict


@pytest.mark.parametrize(
    ("ends", "tone", "claim"),
    [
        ([0.01, 0.03], "good", "Re-ranking helps"),
        ([-0.03, -0.01], "bad", "makes the order worse"),
        ([-0.01, 0.03], "open", "no difference that these queries can show"),
    ],
)
def test_verdict_follows_the_interval(ends: list[float], tone: str, claim: str) -> None:
    metrics = metrics_of(made_up_queries(40))
    for compared in metrics["difference"].values():
        compared |= {"mean": sum(ends) / 2, "ci95": ends}
    outcome = verdict(metrics)
    assert outcome.tone == tone
    assert claim in outcome.sentence


def test_verdict_does_not_call_maxsim_untrained() -> None:
    """found.md A19: the projections of its tokens are fitted to the train labels."""
    metrics = metrics_of(made_up_queries(40))
    metrics["baselines"] = {"maxsim": metrics["baselines"]["k_reciprocal"]}
    text = " ".join(verdict(metrics))
    assert "Best without the trained head: MaxSim of tokens fitted to train labels" in text
    assert "without training" not in text


def test_verdict_says_first_that_a_baseline_without_the_head_is_better() -> None:
    metrics = metrics_of(made_up_queries(40))
    for compared in metrics["difference"].values():
        compared |= {"mean": 0.02, "ci95": [0.01, 0.03]}
    assert "Best without the trained head: k-reciprocal" in verdict(metrics).detail
    metrics["baselines"] = baselines_of(metrics["reranked"], against=0.04)
    outcome = verdict(metrics)
    assert outcome.tone == "bad"
    assert outcome.sentence.startswith(
        "k-reciprocal re-ranking, which needs no trained head, is better than this chain"
    )
    assert "+0.040; 95 % interval +0.030 to +0.050" in outcome.sentence
    assert outcome.next_step == "Leave this chain out and use what is better: k-reciprocal re-ranking."
    assert outcome.detail.startswith("Re-ranking helps")
    metrics["baselines"] = baselines_of(metrics["reranked"], against=0.005)
    assert verdict(metrics).tone == "good", "not beyond chance"


@pytest.mark.parametrize("gain", [0.0, -0.01])
def test_verdict_calls_no_baseline_best_that_gains_nothing(gain: float) -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["baselines"]["k_reciprocal"]["difference"]["map@10"]["mean"] = gain
    assert "Best" not in verdict(metrics).detail
    assert "Nothing is gained without the trained head; at best: k-reciprocal" in verdict(metrics).detail


@pytest.mark.parametrize(
    ("change", "moved"),
    [(0.1, "rises from 0.400 to 0.500"), (-0.1, "falls from 0.600 to 0.500"), (0.0, "stays at 0.500")],
)
def test_verdict_says_where_the_metric_went(change: float, moved: str) -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["first_stage"]["map@10"], metrics["reranked"]["map@10"] = 0.5 - change, 0.5
    metrics["difference"]["map@10"]["mean"] = change
    assert f"mAP@10 {moved} (" in verdict(metrics).sentence


def test_verdict_in_plain_words_counts_first_places_and_right_items() -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["first_stage"] |= {"cmc@1": 0.2528, "precision@5": 0.2, "precision@10": 0.175}
    metrics["reranked"] |= {"cmc@1": 0.375, "precision@5": 0.4, "precision@10": 0.246}
    metrics["difference"]["cmc@1"] |= {"mean": 0.1222, "ci95": [0.05, 0.19]}
    assert verdict(metrics).plain == (
        "The right item comes first for 38 of 100 queries instead of 25; of 10 shown, 2.5 are right instead of 1.8."
    )
    metrics["difference"]["cmc@1"]["ci95"] = [-0.01, 0.19]
    assert "instead of 25, which may be chance; of 10" in verdict(metrics).plain
    metrics["reranked"]["cmc@1"] = 0.2531
    assert verdict(metrics).plain.startswith("The right item comes first for 25.3 of 100 queries instead of 25.3")


def test_verdict_is_mixed_where_the_first_place_or_most_metrics_fall() -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["difference"] = {
        "map@10": {"mean": 0.02, "ci95": [0.01, 0.03]},
        "cmc@1": {"mean": -0.02, "ci95": [-0.03, -0.01]},
        "mrr": {"mean": 0.01, "ci95": [0.0, 0.02]},
    }
    assert verdict(metrics)[:1] == ("open",)
    assert "helps some metrics and harms others" in verdict(metrics).sentence
    metrics["difference"]["cmc@1"]["ci95"] = [-0.04, 0.01]
    assert verdict(metrics).tone == "good"
    metrics["difference"]["mrr"]["mean"] = -0.01
    assert verdict(metrics).tone == "open"


def test_verdict_names_the_next_step() -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["oracle"]["cmc@1"] = 0.6
    assert "for only 60 of 100 queries: give more candidates (--top-n)" in verdict(metrics).next_step
    metrics["oracle"]["cmc@1"] = 0.95
    assert verdict(metrics).next_step.startswith("Do not use this chain yet")
    for compared in metrics["difference"].values():
        compared |= {"mean": 0.02, "ci95": [0.01, 0.03]}
    metrics["reranked"]["cmc@1"] = 0.9
    assert "table of thresholds" in verdict(metrics).next_step


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("kept", "+0.020 is as promised."),
        ("less", "+0.020 is less than promised: these queries may differ from the labels set aside."),
        ("more", "+0.020 is more than promised."),
    ],
)
def test_verdict_compares_with_what_training_promised(outcome: str, words: str) -> None:
    metrics = metrics_of(made_up_queries(40))
    assert "promised" not in verdict(metrics).detail
    gain = {"promised": 0.03, "ci95": [0.01, 0.05], "shown": 0.02, "outcome": outcome}
    metrics["promise"] = {"map@10": gain}
    told = f"The labels set aside in training promised mAP@10 +0.030 (such queries show +0.010 to +0.050); {words}"
    assert told in verdict(metrics).detail
