"""The outcome in a terminal."""

import json

from report_examples import made_up_queries, metrics_of

from distributed_rerank.evaluation.exports import markdown_summary
from distributed_rerank.report.console import table_in_text
from distributed_rerank.report.formatting import in_table_order


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


def test_table_of_stored_metrics_is_that_of_the_run_itself() -> None:
    """A JSON file has its names in the order of letters: CMC@10 before CMC@5, and mAP last."""
    metrics = metrics_of(made_up_queries(40))
    stored = json.loads(json.dumps(metrics, sort_keys=True))
    assert table_in_text(stored) == table_in_text(metrics)
    assert markdown_summary(stored) == markdown_summary(metrics)
    keys = ["mrr", "map@r", "map@10", "own@3", "map@5", "cmc@10", "cmc@5"]
    assert in_table_order(keys) == ["cmc@5", "cmc@10", "map@5", "map@10", "map@r", "mrr", "own@3"]
