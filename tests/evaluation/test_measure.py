"""Figures of planted rankings against values worked out by hand."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from planted_runs import planted_catalogue, planted_ranking

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation import measure as measuring
from distributed_rerank.evaluation.measure import count_relevant, measure
from distributed_rerank.tensors.candidate_lists import CandidateLists


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """Queries 0, 1, 2 of the labels x, y, z; gallery 3 to 8 of the labels x, x, y, x, y, w."""
    labels = ["x", "y", "z", "x", "x", "y", "x", "y", "w"]
    rows = [(f"{n}.png", label, "validation", n < 3, n >= 3, "ab"[n % 2]) for n, label in enumerate(labels)]
    columns = ["path", "label", "split", "is_query", "is_gallery", "category"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "df.csv", index=False)
    return read_catalogue(str(tmp_path / "df.csv"), purpose="evaluation")


QUERIES = torch.tensor([0, 1, 2])


def ranking(*rows: list[int]) -> CandidateLists:
    items = torch.tensor(rows)
    places = torch.arange(1, items.shape[1] + 1, dtype=torch.float32).expand(items.shape)
    return CandidateLists(torch.arange(len(items)), items, torch.where(items >= 0, places, torch.inf))


BEFORE = ranking([5, 3, 8, 4], [3, 4, 6, 5], [3, 4, 5, 6])
AFTER = {2: ranking([3, 5, 8, 4], [4, 3, 6, 5], [4, 3, 5, 6]), 4: ranking([3, 4, 5, 8], [5, 3, 4, 6], [4, 3, 5, 6])}


def test_measure_planted_ranking_gives_the_values_of_the_definitions(catalogue: Catalogue) -> None:
    found = measure(catalogue, QUERIES, BEFORE, AFTER, ks=(1, 2)).metrics
    assert (found["n_queries"], found["n_without_relevant"], found["n_gallery"]) == (2, 1, 6)
    # x: hits at 2 and 4 of 3 relevant; y: a hit at 4 of 2 relevant
    first = found["first_stage"]
    assert (first["cmc@1"], first["cmc@2"], first["precision@2"]) == (0, 1 / 2, 1 / 4)
    assert first["map@2"] == pytest.approx((1 / 2) / 2 / 2)
    assert first["map@10"] == pytest.approx(((1 / 2 + 2 / 4) / 3 + (1 / 4) / 2) / 2)
    assert first["mrr"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    # after: x hits at 1 and 2, y at 1
    last = found["reranked"]
    assert (last["cmc@1"], last["precision@2"], last["mrr"]) == (1, 3 / 4, 1)
    assert last["map@10"] == pytest.approx(((1 + 1) / 3 + 1 / 2) / 2)
    assert found["top_n"] == 4
    assert found["oracle"] == pytest.approx(last), "the planted order is the best that four candidates allow"
    assert found["headroom_captured"]["map@10"] == pytest.approx(1)
    assert [point["top_n"] for point in found["curve"]] == [2, 4]
    assert found["curve"][0]["metrics"]["cmc@1"] == 1 / 2
    difference = found["difference"]["cmc@1"]
    assert (difference["mean"], difference["n_better"], difference["n_worse"]) == (1, 2, 0)
    assert found["categories"]["a"]["n_queries"] == 1
    assert found["categories"]["b"]["first_stage"]["mrr"] == 1 / 4
    assert found["categories"]["b"]["reranked"]["mrr"] == 1
    changes = found["categories"]["b"]["difference"]
    assert set(changes) == {"cmc@1", "map@10"}
    assert (changes["cmc@1"]["mean"], changes["cmc@1"]["n_better"], changes["cmc@1"]["n_clusters"]) == (1, 1, 1)


def test_measure_per_query_holds_first_hits_and_ids(catalogue: Catalogue) -> None:
    before = ranking([5, 3, 8, 4], [3, 4, 6, -1], [3, 4, 5, 6])
    table = measure(catalogue, QUERIES, before, AFTER).per_query
    assert table["query_id"].tolist() == ["0.png", "1.png"]
    assert table["label"].tolist() == ["x", "y"]
    assert table["n_relevant"].tolist() == [3, 2]
    assert table["first_hit_before"].isna().tolist() == [False, True]
    assert table["first_hit_before"][0] == 2
    assert table["first_hit_after"].tolist() == [1, 1]
    assert table["cmc@1_before"].tolist() == [0, 0]


def test_measure_first_stage_alone_has_nothing_re_ranked(catalogue: Catalogue) -> None:
    found = measure(catalogue, QUERIES, BEFORE, {})
    assert set(found.metrics) == {"n_queries", "n_gallery", "n_without_relevant", "first_stage", "oml", "categories"}
    assert not [column for column in found.per_query if column.endswith("_after") and column != "first_hit_after"]


def test_measure_omls_precision_divides_by_what_exists(catalogue: Catalogue) -> None:
    """OML case 1: precision of two hits in a list of two with three relevant is 1 at k = 5."""
    found = measure(catalogue, torch.tensor([0]), ranking([3, 4]), {}, ks=(5,)).metrics
    assert found["oml"]["first_stage"]["precision@5"] == 1
    assert found["first_stage"]["precision@5"] == 2 / 5


def test_measure_seed_decides_intervals_only(catalogue: Catalogue) -> None:
    one, same, other = (measure(catalogue, QUERIES, BEFORE, AFTER, seed=seed).metrics for seed in (1, 1, 2))
    assert one == same
    assert one["reranked"] == other["reranked"]


def test_measure_asks_for_a_block_at_a_time_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = planted_catalogue(tmp_path, n_labels=12)
    before, *after = (planted_ranking(catalogue, {"toys": share}, seed) for seed, share in enumerate((0.9, 0.5, 0.1)))
    queries = torch.from_numpy(catalogue.query_items)
    whole = measure(catalogue, queries, before, dict(zip((2, 4), after, strict=True)), n_resamples=50)
    asked: list[int] = []

    class Watched:
        def __init__(self, ranking: CandidateLists) -> None:
            self.ranking = ranking

        def __getitem__(self, rows: torch.Tensor) -> CandidateLists:
            asked.append(len(rows))
            return self.ranking[rows]

    monkeypatch.setattr(measuring, "QUERIES_PER_BLOCK", 5)
    watched = {top_n: Watched(ranking) for top_n, ranking in zip((2, 4), after, strict=True)}
    found = measure(catalogue, queries, Watched(before), watched, n_resamples=50)
    assert max(asked) == 5 < len(queries)
    assert found.metrics == whole.metrics
    pd.testing.assert_frame_equal(found.per_query, whole.per_query, check_exact=True)


def test_measure_nothing_relevant_is_refused(catalogue: Catalogue) -> None:
    with pytest.raises(BadInput, match="no query has a relevant gallery item"):
        measure(catalogue, torch.tensor([2]), ranking([3, 4]), {})


def test_omls_figures_count_queries_without_a_relevant_item_and_ours_leave_them_out(catalogue: Catalogue) -> None:
    """z has none: OML counts 0 for it, and 1 where its list is empty as well."""
    found = measure(catalogue, QUERIES, BEFORE, {}, ks=(4,)).metrics
    assert (found["first_stage"]["cmc@4"], found["oml"]["first_stage"]["cmc@4"]) == (1, 2 / 3)
    empty = ranking([5, 3, 8, 4], [3, 4, 6, 5], [-1, -1, -1, -1])
    found = measure(catalogue, QUERIES, empty, {}, ks=(4,)).metrics
    assert (found["first_stage"]["cmc@4"], found["oml"]["first_stage"]["cmc@4"]) == (1, 1)


def test_count_relevant_leaves_out_own_item_and_sequence(catalogue: Catalogue) -> None:
    table = catalogue.table.assign(is_gallery=True, sequence=["s", None, None, "s", None, None, None, None, None])
    labelled = count_relevant(Catalogue(table, "test"), QUERIES)
    # x: items 0 (itself), 3 (its sequence), 4, 6; y: 1 (itself), 5, 7; z: itself alone
    assert labelled.query_items.tolist() == [0, 1]
    assert labelled.n_relevant.tolist() == [2, 2]
    assert labelled.n_without_relevant == 1


def test_own_metric_is_measured_beside_the_others_or_refused(catalogue: Catalogue) -> None:
    def second(is_relevant: torch.Tensor, n_relevant: torch.Tensor) -> torch.Tensor:
        return is_relevant[:, 1]

    found = measure(catalogue, QUERIES, BEFORE, AFTER, own={"second": second})
    # the second candidates are 3 for query 0 (both x) and 4 for query 1 (y, x)
    assert found.per_query["second_before"].tolist() == [1.0, 0.0]
    assert found.metrics["first_stage"]["second"] == 0.5
    assert {"second"} <= set(found.metrics["oracle"]) & set(found.metrics["difference"])
    for wrong in (lambda is_relevant, _: is_relevant, lambda _, n_relevant: n_relevant / 0 * 0):
        with pytest.raises(BadInput, match="the metric wrong must give one finite number for each query"):
            measure(catalogue, QUERIES, BEFORE, AFTER, own={"wrong": wrong})
