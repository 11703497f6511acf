"""The verdict and the words for numbers."""

import pytest
from report_examples import baselines_of, made_up_queries, metrics_of

from distributed_rerank.report.formatting import interval, metric_name, p_value, signed, verdict


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
    metrics["difference"]["map@10"]["ci95"] = ends
    outcome = verdict(metrics)
    assert outcome.tone == tone
    assert claim in outcome.sentence


def test_verdict_says_first_that_a_baseline_without_training_is_better() -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["difference"]["map@10"]["ci95"] = [0.01, 0.03]
    assert "Best without pairs: k-reciprocal" in verdict(metrics).detail
    metrics["baselines"] = baselines_of(metrics["reranked"], against=0.04)
    outcome = verdict(metrics)
    assert outcome.tone == "bad"
    assert outcome.sentence.startswith("k-reciprocal re-ranking, which looks at no pair, is better than this chain")
    assert "+0.040; 95 % interval +0.030 to +0.050" in outcome.sentence
    assert outcome.detail.startswith("Re-ranking helps")
    metrics["baselines"] = baselines_of(metrics["reranked"], against=0.005)
    assert verdict(metrics).tone == "good", "not beyond chance"


@pytest.mark.parametrize("gain", [0.0, -0.01])
def test_verdict_calls_no_baseline_best_that_gains_nothing(gain: float) -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["baselines"]["k_reciprocal"]["difference"]["map@10"]["mean"] = gain
    assert "Best" not in verdict(metrics).detail
    assert "Nothing is gained without pairs; at best: k-reciprocal" in verdict(metrics).detail


def test_numbers_and_names_in_words() -> None:
    assert [signed(value) for value in (0.0374, -0.02, -0.0001, 0.0, None)] == [
        "+0.037",
        "−0.020",
        "0.000",
        "0.000",
        "–",
    ]
    assert interval({"ci95": [-0.02, 0.0374]}) == "−0.020 to +0.037"
    assert [p_value(value) for value in (0.0004, 0.04, None)] == ["< 0.001", "0.040", "–"]
    assert [metric_name(key) for key in ("map@10", "map@r", "cmc@1", "mrr")] == [
        "mAP@10",
        "mAP@R",
        "CMC@1",
        "MRR",
    ]


@pytest.mark.parametrize(
    ("change", "moved"),
    [(0.1, "rises from 0.400 to 0.500"), (-0.1, "falls from 0.600 to 0.500"), (0.0, "stays at 0.500")],
)
def test_verdict_says_where_the_metric_went(change: float, moved: str) -> None:
    metrics = metrics_of(made_up_queries(40))
    metrics["first_stage"]["map@10"], metrics["reranked"]["map@10"] = 0.5 - change, 0.5
    metrics["difference"]["map@10"]["mean"] = change
    assert f"mAP@10 {moved} (" in verdict(metrics).sentence
