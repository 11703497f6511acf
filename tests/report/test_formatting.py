"""The words for numbers."""

from distributed_rerank.report.formatting import interval, metric_name, signed


def test_numbers_and_names_in_words() -> None:
    assert [signed(value) for value in (0.0374, -0.02, -0.0001, 0.0, None)] == [
        "+0.037",
        "−0.020",
        "0.000",
        "0.000",
        "–",
    ]
    assert interval({"ci95": [-0.02, 0.0374]}) == "−0.020 to +0.037"
    assert [metric_name(key) for key in ("map@10", "map@r", "cmc@1", "mrr")] == [
        "mAP@10",
        "mAP@R",
        "CMC@1",
        "MRR",
    ]
