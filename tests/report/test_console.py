"""The outcome in a terminal."""

from report_examples import made_up_queries, metrics_of

from distributed_rerank.report.console import table_in_text


def test_table_in_text_has_a_line_for_every_metric_below_the_verdict() -> None:
    metrics = metrics_of(made_up_queries(40))
    lines = table_in_text(metrics).splitlines()
    assert lines[1].startswith("Re-ranking makes no difference")
    assert lines[4].startswith("40 queries, 1234 gallery items, 5 queries without a relevant item left out, 1 images")
    before, after = metrics["first_stage"]["cmc@1"], metrics["reranked"]["cmc@1"]
    row = next(line for line in lines[5:] if line.startswith("CMC@1"))
    assert row.split()[:3] == ["CMC@1", f"{before:.3f}", f"{after:.3f}"]
    assert row.endswith("−0.020 to +0.040")


def test_table_in_text_of_the_first_stage_alone_has_no_change() -> None:
    metrics = {"n_queries": 3, "n_gallery": 4, "n_without_relevant": 0, "first_stage": {"map@10": 0.25}}
    text = table_in_text(metrics)
    assert text.splitlines()[0] == "First stage alone: mAP@10 is 0.250."
    assert "chain: first stage" in text
    assert "change" not in text
