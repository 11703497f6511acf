"""Costs against literal counts; histograms and labels to check, planted by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_catalogue import concat_model, make_catalogue, make_lists

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.evaluation.diagnostics import (
    N_BINS,
    cost_by_top_n,
    distance_histograms,
    read_pace,
    seconds_by_top_n,
    total_cost,
)
from distributed_rerank.evaluation.measure import count_relevant
from distributed_rerank.evaluation.ranked import Ranked, rank
from distributed_rerank.reranking.lists import FirstStage
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.manifests import write_manifest
from distributed_rerank.tensors.candidate_lists import CandidateLists


def test_cost_by_top_n_counts_pairs_and_distinct_images() -> None:
    catalogue_size, n_lists, width = 50, 12, 6
    generator = np.random.default_rng(0)
    items = np.stack([generator.permutation(catalogue_size)[:width] for _ in range(n_lists)])
    logits = generator.random((n_lists, width)).astype(np.float32)
    logits[3, 4:] = np.nan
    logits[7] = np.nan
    lists = make_lists_of(items)
    costs = cost_by_top_n(
        ScoredLists(lists, torch.from_numpy(logits)),
        {"gflop_per_pair": 0.5, "bytes_per_image": 10},
        [2, 3, 6],
        catalogue_size,
    )
    for top_n, point in zip((2, 3, 6), costs, strict=True):
        pairs = [
            (row, items[row, column]) for row in range(n_lists) for column in range(top_n)
            if np.isfinite(logits[row, column])
        ]  # fmt: skip
        images = {int(lists.query_items[row]) for row, _ in pairs} | {int(item) for _, item in pairs}
        assert point == {
            "pairs": len(pairs), "images": len(images), "gflop": 0.5 * len(pairs), "bytes": 10 * len(images)
        }  # fmt: skip


def make_lists_of(items: np.ndarray) -> CandidateLists:
    return CandidateLists.from_arrays(np.arange(len(items)), items, np.zeros(items.shape, np.float32))


def test_nothing_scored_costs_nothing() -> None:
    scored = ScoredLists(make_lists_of(np.zeros((2, 3), np.int64)))
    assert cost_by_top_n(scored, {}, [3], 5) == []
    assert total_cost(scored, concat_model()) == {"pairs": 0, "unique_images": 0}


def test_pace_of_a_continued_run_is_that_of_what_it_scored(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 9)
    score_candidates(catalogue, make_lists(catalogue, 4), concat_model(), 4, tmp_path / "out")
    pace = read_pace(tmp_path / "out")
    assert pace is not None
    assert pace["n_workers"] == 1
    assert pace["seconds_per_image"] > 0
    assert pace["seconds_per_pair"] > 0
    manifest = artifacts.read_manifest(tmp_path / "out")
    write_manifest(tmp_path / "out", manifest | {"counts": {"pairs_scored": 0}})
    assert read_pace(tmp_path / "out") is None, "a run that scored nothing knows no seconds"
    assert read_pace(tmp_path / "nowhere") is None


def test_seconds_and_price_follow_images_and_pairs() -> None:
    curve = [{"top_n": 5, "images": 10, "pairs": 100}, {"top_n": 10, "images": 20, "pairs": 400}]
    pace = {"seconds_per_image": 0.1, "seconds_per_pair": 0.01, "n_workers": 2}
    small, large = seconds_by_top_n(curve, pace, 50, 36.0)
    assert (small["seconds"], large["seconds"]) == (2.0, 6.0)
    assert large["worker_seconds"] == 12.0
    assert large["seconds_per_query"] == pytest.approx(0.12)
    # 12 worker-seconds at 0.01 a second for 50 queries
    assert large["price_per_1000_queries"] == pytest.approx(2.4)
    assert "price_per_1000_queries" not in seconds_by_top_n(curve, pace, 50, None)[0]
    assert seconds_by_top_n(curve, None, 50, 36.0) == []


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """Items 0 to 3 of label 0, 4 to 7 of label 1, 8 and 9 of label 2."""
    return make_catalogue(tmp_path, 10)


def ranked_of(catalogue: Catalogue, rows: dict[int, list[tuple[int, float]]]) -> Ranked:
    width = max(map(len, rows.values()))
    items = [[item for item, _ in row] + [-1] * (width - len(row)) for row in rows.values()]
    distances = [[value for _, value in row] + [float("inf")] * (width - len(row)) for row in rows.values()]
    lists = CandidateLists(torch.tensor(list(rows)), torch.tensor(items), torch.tensor(distances))
    return rank(FirstStage(catalogue, lists, None, []), ScoredLists(lists), Chain(), has_model=False)


def test_distance_histograms_count_every_listed_candidate_once(catalogue: Catalogue) -> None:
    ranked = ranked_of(catalogue, {0: [(1, 0.0), (4, 0.5), (2, 1.0)], 4: [(8, 0.25), (5, 0.5)]})
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    histograms = distance_histograms(ranked.before, queries, 3)
    assert (histograms["edges"][0], histograms["edges"][-1], len(histograms["edges"])) == (0.0, 1.0, N_BINS + 1)
    assert (sum(histograms["relevant"]), sum(histograms["other"])) == (3, 2)
    assert (histograms["relevant"][0], histograms["relevant"][-1], histograms["relevant"][N_BINS // 2]) == (1, 1, 1)
    assert sum(distance_histograms(ranked.before, queries, 1)["other"]) == 1
    assert distance_histograms(ranked_of(catalogue, {0: [(1, 0.5)]}).before, queries, 3) == {}
