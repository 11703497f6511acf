"""TREC files against their definition and a reader of our own."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.exports import trec_scores, write_qrels, write_trec_run
from distributed_rerank.data.schemas import SCHEMAS


def numbers(texts: list[str]) -> np.ndarray:
    return np.array([np.float32(text) for text in texts])


def test_trec_scores_without_ties_are_exactly_minus_distance() -> None:
    distances = np.sort(np.random.default_rng(0).random(50).astype(np.float32))
    assert np.array_equal(numbers(trec_scores(distances, np.array([0]))), -distances)


@pytest.mark.parametrize("values", [[0, 0, 0], [-1, -1, -0.0, 0, 0, 1e-45, 3, 3], [2, 2, 1, 5], [1e30, 1e30]])
def test_trec_scores_of_ties_fall_strictly_in_either_precision(values: list[float]) -> None:
    texts = trec_scores(np.array(values, np.float32), np.array([0]))
    assert (np.diff(numbers(texts)) < 0).all()
    assert (np.diff([float(text) for text in texts]) < 0).all()
    assert np.allclose(numbers(texts)[0], -values[0])


def test_trec_scores_of_each_list_start_anew() -> None:
    distances = np.array([0.5, 0.5, 0.9, 0.1, 0.1], np.float32)
    scores = numbers(trec_scores(distances, np.array([0, 3])))
    assert scores[[0, 2, 3]].tolist() == (-distances[[0, 2, 3]]).tolist()


def test_trec_run_read_back_is_the_same_table(tmp_path: Path) -> None:
    columns = {
        "query_id": pa.array(["a", "a", "b"]),
        "gallery_id": pa.array(["x", "y", "x"]),
        "rank": pa.array([1, 2, 1], pa.int32()),
        "distance": pa.array([0.25, 0.75, 0.5], pa.float32()),
    }
    table = pa.table(columns)
    write_trec_run(tmp_path / "run", [table[:2], table[2:]], "mine")
    (tmp_path / "df.csv").write_text("path\na\nb\nx\ny\n")
    catalogue = read_catalogue(str(tmp_path / "df.csv"))
    assert candidates_table(read_candidates(tmp_path / "run", catalogue), catalogue.ids).equals(table)
    assert (tmp_path / "run").read_text().splitlines()[1] == "a Q0 y 2 -0.75 distributed_rerank:mine"


def test_trec_files_of_no_rows_are_empty(tmp_path: Path) -> None:
    write_trec_run(tmp_path / "run", [SCHEMAS["candidates"].empty_table()], "mine")
    assert (tmp_path / "run").read_text() == ""


def test_ids_with_white_space_keep_six_fields_and_stay_different(tmp_path: Path) -> None:
    ids = ["a b", "a%20b", "a\tb", "a\u00a0b", "ab"]
    write_qrels(tmp_path / "qrels", [("q 1", ids)])
    lines = [line.split(" ") for line in (tmp_path / "qrels").read_text().splitlines()]
    assert [line[2] for line in lines] == ["a%20b", "a%2520b", "a%09b", "a%C2%A0b", "ab"]
    assert {line[0] for line in lines} == {"q%201"}
    assert {len(line) for line in lines} == {4}
