from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from distributed_rerank.data import candidates, tables
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue, read_catalogue
from distributed_rerank.errors import BadInput

ROWS = [("q2", "g1", 0.5), ("q1", "g2", 0.25), ("q1", "g10", 0.25), ("q1", "g1", 0.0), ("q2", "g2", 3.0)]
SORTED = [("q1", "g1", 1), ("q1", "g10", 2), ("q1", "g2", 3), ("q2", "g1", 1), ("q2", "g2", 2)]


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    (tmp_path / "df.csv").write_text("path\n" + "\n".join(["q1", "q2", "g1", "g2", "g10"]))
    return read_catalogue(str(tmp_path / "df.csv"))


def _triples(table: pa.Table) -> list[tuple]:
    return list(zip(*(table[name].to_pylist() for name in ("query_id", "gallery_id", "rank")), strict=True))


def _frame(value: str = "distance") -> pd.DataFrame:
    frame = pd.DataFrame(ROWS, columns=["query_id", "gallery_id", value])
    return frame if value == "distance" else frame.assign(score=-frame[value])


@pytest.mark.parametrize("value", ["distance", "score"])
@pytest.mark.parametrize("form", ["csv", "parquet", "folder"])
def test_read_candidates_every_form_gives_the_same_table(tmp_path: Path, value: str, form: str) -> None:
    path = tmp_path / ("list" if form == "folder" else f"list.{form}")
    if form == "csv":
        _frame(value).to_csv(path, index=False)
    elif form == "parquet":
        _frame(value).to_parquet(path, index=False)
    else:
        path.mkdir()
        _frame(value)[:2].to_parquet(path / "a.parquet", index=False)
        _frame(value)[2:].to_parquet(path / "b.parquet", index=False)
    table = candidates.read_candidates(path)
    assert table.schema == tables.SCHEMAS["candidates"]
    assert _triples(table) == SORTED
    assert table["distance"].to_pylist() == [0.0, 0.25, 0.25, 0.5, 3.0]


def test_trec_run_uses_its_score_only(tmp_path: Path) -> None:
    lines = [f"{q} Q0 {g}\t{rank} {-distance} run-1" for rank, (q, g, distance) in enumerate(ROWS)]
    (tmp_path / "run.txt").write_text("\n".join(lines) + "\n")
    table = candidates.read_candidates(tmp_path / "run.txt")
    assert _triples(table) == SORTED
    assert table["distance"].to_pylist() == [0.0, 0.25, 0.25, 0.5, 3.0]


def test_ids_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("query_id,gallery_id,distance\n007,010,1\n")
    assert _triples(candidates.read_candidates(tmp_path / "c.csv")) == [("007", "010", 1)]


def test_given_ranks_break_ties_and_count_from_one(tmp_path: Path) -> None:
    frame = _frame().assign(rank=[0, 1, 2, 0, 7])
    frame.to_parquet(tmp_path / "c.parquet", index=False)
    assert _triples(candidates.read_candidates(tmp_path / "c.parquet"))[:3] == [
        ("q1", "g1", 1),
        ("q1", "g2", 2),
        ("q1", "g10", 3),
    ]
    frame.assign(distance=-frame["distance"]).to_parquet(tmp_path / "s.parquet", index=False)
    with pytest.raises(BadInput, match=r"distances of query 'q1' fall where the rank grows; .* call the column score"):
        candidates.read_candidates(tmp_path / "s.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "query_id,gallery_id,distance\nq,g,1\nq,h,1\nq,g,2\n",
            r"'q' and gallery item 'g' are paired twice \(row 3\)",
        ),
        ("query_id,gallery_id,distance\nq,g,x\n", "1 values of distance are not finite, first in row 1"),
        ("query_id,gallery_id,distance\nq,g,inf\n", "not finite"),
        ("query_id,gallery_id,distance\nq,,1\n", "1 rows without query_id or gallery_id"),
        ("query_id,gallery_id\nq,g\n", "distance or score"),
        ("query_id,gallery_id,distance,score\nq,g,1,1\n", "distance or score"),
        ("query_id,gallery_id,distance,colour\nq,g,1,red\n", "distance or score"),
        ("query_id,gallery_id,distance,rank\nq,g,1,\n", "some ranks are empty"),
        ("", "no readable Parquet, CSV or TREC run"),
    ],
)
def test_broken_candidates_are_bad_input(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(BadInput, match=expected):
        candidates.read_candidates(tmp_path / "c.csv")


def test_lists_and_table_invert_each_other(catalogue: Catalogue) -> None:
    lists = CandidateLists(
        np.array([3, 4], np.int64),
        np.array([[2, 0, 1], [1, -1, -1]], np.int64),
        np.array([[0.5, 0.75, 0.75], [1.0, np.inf, np.inf]], np.float32),
    )
    table = candidates.candidates_table(lists, catalogue.ids)
    assert _triples(table) == [("q1", "g2", 1), ("q1", "g1", 2), ("q1", "g10", 3), ("q2", "g10", 1)]
    shuffled = table.take(pa.array([3, 1, 0, 2]))
    back = candidates.candidate_lists(shuffled, catalogue)
    for got, expected in zip(back, lists, strict=True):
        assert np.array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_lists_of_no_candidates_are_empty(catalogue: Catalogue) -> None:
    lists = candidates.candidate_lists(tables.SCHEMAS["candidates"].empty_table(), catalogue)
    assert lists.items.shape == (0, 0)
    assert candidates.candidates_table(lists, catalogue.ids).num_rows == 0


def test_unknown_ids_are_named(catalogue: Catalogue) -> None:
    table = pa.table({"query_id": ["q1"], "gallery_id": ["stranger"], "rank": [1], "distance": [0.0]})
    with pytest.raises(BadInput, match="stranger"):
        candidates.candidate_lists(tables.conform(table, "candidates"), catalogue)


def test_aligned_logits_find_their_places_and_leave_nan(catalogue: Catalogue) -> None:
    lists = CandidateLists(
        np.array([3, 4], np.int64), np.array([[2, 0], [1, -1]], np.int64), np.zeros((2, 2), np.float32)
    )
    pairs = candidates.pairs_table(
        np.array(["q2", "q1", "q1"], object),
        np.array(["g10", "g10", "g2"], object),
        np.array([1.5, 9.0, -2.0]),
    )
    expected = np.array([[-2.0, np.nan], [1.5, np.nan]], np.float32)
    logits = candidates.aligned_logits(pairs, catalogue, lists)
    assert catalogue.ids.tolist() == ["g1", "g10", "g2", "q1", "q2"]
    assert np.array_equal(logits, expected, equal_nan=True)
    assert np.isnan(candidates.aligned_logits(pairs.slice(0, 0), catalogue, lists)).all()
    with pytest.raises(BadInput, match="two logits"):
        candidates.aligned_logits(pa.concat_tables([pairs, pairs]), catalogue, lists)
