"""Costs of each top_n against literal counts."""

from pathlib import Path

import numpy as np
import pytest
from small_catalogue import concat_model, make_catalogue, make_lists

from distributed_rerank.data import artifacts, manifests
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.evaluation.cost import cost_of_each, read_pace, seconds_of_each, total_cost
from distributed_rerank.reranking.run import Scored
from distributed_rerank.scoring.plan import ScoringConfig
from distributed_rerank.scoring.stage import score_candidates


def test_cost_of_each_top_n_counts_pairs_and_distinct_images() -> None:
    catalogue_size, n_lists, width = 50, 12, 6
    generator = np.random.default_rng(0)
    items = np.stack([generator.permutation(catalogue_size)[:width] for _ in range(n_lists)])
    logits = generator.random((n_lists, width)).astype(np.float32)
    logits[3, 4:] = np.nan
    logits[7] = np.nan
    lists = make_lists_of(items)
    found = cost_of_each(
        Scored(lists, logits, []), {"gflop_per_pair": 0.5, "bytes_per_image": 10}, [2, 3, 6], catalogue_size
    )
    for top_n, point in zip((2, 3, 6), found, strict=True):
        pairs = [
            (row, items[row, column]) for row in range(n_lists) for column in range(top_n)
            if np.isfinite(logits[row, column])
        ]  # fmt: skip
        images = {int(lists.query_items[row]) for row, _ in pairs} | {int(item) for _, item in pairs}
        assert point == {
            "pairs": len(pairs), "images": len(images), "gflop": 0.5 * len(pairs), "bytes": 10 * len(images)
        }  # fmt: skip


def make_lists_of(items: np.ndarray) -> CandidateLists:
    return CandidateLists(np.arange(len(items)), items, np.zeros(items.shape, np.float32))


def test_nothing_scored_costs_nothing() -> None:
    scored = Scored(make_lists_of(np.zeros((2, 3), np.int64)), None, [])
    assert cost_of_each(scored, {}, [3], 5) == []
    assert total_cost(scored, concat_model()) == {"pairs": 0, "unique_images": 0}


def test_pace_of_a_continued_run_is_that_of_what_it_scored(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 9)
    score_candidates(catalogue, make_lists(catalogue, 4), concat_model(), ScoringConfig(top_n=4), tmp_path / "out")
    pace = read_pace(tmp_path / "out")
    assert pace is not None
    assert pace["n_workers"] == 1
    assert pace["seconds_per_image"] > 0
    assert pace["seconds_per_pair"] > 0
    manifest = artifacts.read_manifest(tmp_path / "out")
    manifests.write_manifest(tmp_path / "out", manifest | {"counts": {"pairs_scored": 0}})
    assert read_pace(tmp_path / "out") is None, "a run that scored nothing knows no seconds"
    assert read_pace(tmp_path / "nowhere") is None


def test_seconds_and_price_follow_images_and_pairs() -> None:
    curve = [{"top_n": 5, "images": 10, "pairs": 100}, {"top_n": 10, "images": 20, "pairs": 400}]
    pace = {"seconds_per_image": 0.1, "seconds_per_pair": 0.01, "n_workers": 2}
    small, large = seconds_of_each(curve, pace, 50, 36.0)
    assert (small["seconds"], large["seconds"]) == (2.0, 6.0)
    assert large["worker_seconds"] == 12.0
    assert large["seconds_per_query"] == pytest.approx(0.12)
    # 12 worker-seconds at 0.01 a second for 50 queries
    assert large["price_per_1000_queries"] == pytest.approx(2.4)
    assert "price_per_1000_queries" not in seconds_of_each(curve, pace, 50, None)[0]
    assert seconds_of_each(curve, None, 50, 36.0) == []
