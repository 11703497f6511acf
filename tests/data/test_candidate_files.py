"""Lists of other systems: every form gives the same lists, whatever the batches they are read in."""

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.gathering import gather_lists
from distributed_rerank.data.tables import load_batches
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists

ROWS = [("q2", "g1", 0.5), ("q1", "g2", 0.25), ("q1", "g10", 0.25), ("q1", "g1", 0.0), ("q2", "g2", 3.0)]
SORTED = [("q1", "g1", 1), ("q1", "g10", 2), ("q1", "g2", 3), ("q2", "g1", 1), ("q2", "g2", 2)]


def _catalogue(folder: Path, *ids: str) -> Catalogue:
    (folder / "df.csv").write_text("\n".join(["path", *ids]) + "\n")
    return read_catalogue(str(folder / "df.csv"))


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return _catalogue(tmp_path, "q1", "q2", "g1", "g2", "g10")


def _triples(lists: CandidateLists, catalogue: Catalogue) -> list[tuple]:
    table = candidates_table(lists, catalogue.ids)
    return list(zip(*(table[name].to_pylist() for name in ("query_id", "gallery_id", "rank")), strict=True))


def _frame(value: str = "distance") -> pd.DataFrame:
    frame = pd.DataFrame(ROWS, columns=["query_id", "gallery_id", value])
    return frame if value == "distance" else frame.assign(score=-frame[value])


@pytest.mark.parametrize("rows_per_batch", [1, 2, 100])
@pytest.mark.parametrize("value", ["distance", "score"])
@pytest.mark.parametrize("form", ["csv", "parquet", "folder", "trec"])
def test_every_form_and_batch_gives_the_same_lists(
    catalogue: Catalogue, tmp_path: Path, value: str, form: str, rows_per_batch: int
) -> None:
    path = tmp_path / ("list" if form == "folder" else f"list.{form}")
    if form == "csv":
        _frame(value).to_csv(path, index=False)
    elif form == "parquet":
        _frame(value).to_parquet(path, index=False)
    elif form == "trec":
        path.write_text("".join(f"{q} Q0 {g}\t{rank} {-d} run-1\n" for rank, (q, g, d) in enumerate(ROWS)))
    else:
        path.mkdir()
        _frame(value)[:2].to_parquet(path / "a.parquet", index=False)
        _frame(value)[2:].to_parquet(path / "b.parquet", index=False)
    lists = read_candidates(path, catalogue, rows_per_batch=rows_per_batch)
    assert _triples(lists, catalogue) == SORTED
    assert lists.distances.tolist() == [[0.0, 0.25, 0.25], [0.5, 3.0, np.inf]]


def test_ids_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    catalogue = _catalogue(tmp_path, "007", "010", "7")
    (tmp_path / "c.csv").write_text("query_id,gallery_id,distance\n007,010,1\n")
    assert _triples(read_candidates(tmp_path / "c.csv", catalogue), catalogue) == [("007", "010", 1)]


def test_given_ranks_break_ties_and_count_from_one(catalogue: Catalogue, tmp_path: Path) -> None:
    frame = _frame().assign(rank=[0, 1, 2, 0, 7])
    frame.to_parquet(tmp_path / "c.parquet", index=False)
    found = _triples(read_candidates(tmp_path / "c.parquet", catalogue), catalogue)
    assert found[:3] == [("q1", "g1", 1), ("q1", "g2", 2), ("q1", "g10", 3)]
    frame.assign(distance=-frame["distance"]).to_parquet(tmp_path / "s.parquet", index=False)
    with pytest.raises(BadInput, match=r"distances of query 'q1' fall where the rank grows; .* call the column score"):
        read_candidates(tmp_path / "s.parquet", catalogue)


def test_ignored_ids_leave_no_gap_and_unknown_ones_are_named(catalogue: Catalogue, tmp_path: Path) -> None:
    _frame().to_csv(tmp_path / "c.csv", index=False)
    small = catalogue.take(catalogue.items_of(["q1", "q2", "g1", "g2"]))
    found = read_candidates(tmp_path / "c.csv", small, ignored={"g10"}, rows_per_batch=2)
    assert _triples(found, small) == [("q1", "g1", 1), ("q1", "g2", 2), ("q2", "g1", 1), ("q2", "g2", 2)]
    with pytest.raises(BadInput, match=r"1 ids are not in .*'g10'"):
        read_candidates(tmp_path / "c.csv", small)


@pytest.mark.parametrize("rows_per_batch", [1, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("query_id,gallery_id,distance\nq,g,1\nq,h,1\nq,g,2\n", "'q' and gallery item 'g' are paired twice"),
        ("query_id,gallery_id,distance\nq,g,1\nq,h,x\nq,q,y\n", "2 values of distance are not finite, first in row 2"),
        ("query_id,gallery_id,distance\nq,g,inf\n", "not finite"),
        ("query_id,gallery_id,distance\nq,g,1\nq,,1\n", "1 rows without query_id or gallery_id, first row 2"),
        ("query_id,gallery_id\nq,g\n", "distance or score"),
        ("query_id,gallery_id,distance,score\nq,g,1,1\n", "distance or score"),
        ("query_id,gallery_id,distance,colour\nq,g,1,red\n", "distance or score"),
        ("query_id,gallery_id,distance,rank\nq,g,1,\n", "some ranks are empty"),
        ("", "no readable Parquet, CSV or TREC run"),
    ],
)
def test_broken_candidates_are_bad_input(tmp_path: Path, text: str, expected: str, rows_per_batch: int) -> None:
    catalogue = _catalogue(tmp_path, "q", "g", "h")
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(BadInput, match=expected):
        read_candidates(tmp_path / "c.csv", catalogue, rows_per_batch=rows_per_batch)


def test_a_folder_of_unlike_files_is_bad_input(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    _frame()[:2].to_parquet(tmp_path / "list" / "a.parquet", index=False)
    _frame("score")[2:].to_parquet(tmp_path / "list" / "b.parquet", index=False)
    with pytest.raises(BadInput, match="distance or score"):
        read_candidates(tmp_path / "list", catalogue)


def test_lists_do_not_depend_on_blocks_batches_or_row_order(tmp_path: Path) -> None:
    """Ragged random lists with ties, against a plain sort of all rows."""
    rng = np.random.default_rng(0)
    catalogue = _catalogue(tmp_path, *(f"{number:02d}" for number in range(40)))
    rows = {(int(q), int(g)): int(d) / 4 for q, g, d in rng.integers((30, 40, 6), size=(600, 3))}
    expected = sorted((q, d, g) for (q, g), d in rows.items())
    frame = pd.DataFrame(
        [(catalogue.ids[q], catalogue.ids[g], d) for (q, g), d in rows.items()],
        columns=["query_id", "gallery_id", "distance"],
    )
    for order in (np.arange(len(frame)), np.lexsort((frame["gallery_id"], frame["distance"], frame["query_id"]))):
        frame.iloc[order].to_parquet(tmp_path / "c.parquet", index=False, row_group_size=7)
        for rows_per_batch, queries_per_block in ((10, 1), (10, 4), (1000, 3), (1000, 1000)):
            batches = load_batches(tmp_path / "c.parquet", "candidates", rows_per_batch)
            lists = gather_lists(batches, catalogue, queries_per_block=queries_per_block)
            queries, items, distances = lists.arrays()
            row, column = np.nonzero(items >= 0)
            found = zip(queries[row], distances[row, column], items[row, column], strict=True)
            assert list(found) == expected


def test_reading_holds_little_more_than_the_lists(tmp_path: Path) -> None:
    """Beyond the 12 bytes a candidate of the lists, their numbers once more and one batch; no text, no copy."""
    catalogue = _catalogue(tmp_path, *(f"a rather long name of an image {number:04d}" for number in range(2000)))
    peaks = []
    for n_queries in (400, 2000):
        query, step = np.divmod(np.arange(n_queries * 50), 50)
        columns = {"query_id": catalogue.ids[query], "gallery_id": catalogue.ids[(query * 7 + step) % 2000]}
        frame = pd.DataFrame({**columns, "distance": step / 50})
        frame.to_parquet(tmp_path / "c.parquet", index=False)
        batches = load_batches(tmp_path / "c.parquet", "candidates", 2000)
        tracemalloc.start()
        lists = gather_lists(batches, catalogue, queries_per_block=40)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert lists.items.shape == (n_queries, 50)
    assert peaks[1] - peaks[0] < 1600 * 50 * 30, "bytes by which 80,000 more candidates raise the peak"
