from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distributed_rerank.data import candidates, tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.gathering import gather_lists
from distributed_rerank.data.schemas import SCHEMAS
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    (tmp_path / "df.csv").write_text("path\n" + "\n".join(["q1", "q2", "g1", "g2", "g10"]))
    return read_catalogue(str(tmp_path / "df.csv"))


def _triples(table: pa.Table) -> list[tuple]:
    return list(zip(*(table[name].to_pylist() for name in ("query_id", "gallery_id", "rank")), strict=True))


def test_table_and_lists_invert_each_other(catalogue: Catalogue) -> None:
    lists = CandidateLists.from_arrays(
        np.array([3, 4], np.int64),
        np.array([[2, 0, 1], [1, -1, -1]], np.int32),
        np.array([[0.5, 0.75, 0.75], [1.0, np.inf, np.inf]], np.float32),
    )
    table = candidates.candidates_table(lists, catalogue.ids)
    assert table.schema == SCHEMAS["candidates"]
    assert _triples(table) == [("q1", "g2", 1), ("q1", "g1", 2), ("q1", "g10", 3), ("q2", "g10", 1)]
    shuffled = table.take(pa.array([3, 1, 0, 2]))
    back = gather_lists([shuffled], catalogue)
    for got, expected in zip(back.arrays(), lists.arrays(), strict=True):
        assert np.array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_lists_of_no_candidates_are_empty(catalogue: Catalogue) -> None:
    lists = gather_lists([SCHEMAS["candidates"].empty_table()], catalogue)
    assert lists.items.shape == (0, 0)
    assert candidates.candidates_table(lists, catalogue.ids).num_rows == 0


def test_aligned_logits_find_their_places_and_leave_nan(catalogue: Catalogue) -> None:
    lists = CandidateLists.from_arrays(
        np.array([3, 4], np.int64), np.array([[2, 0], [1, -1]], np.int64), np.zeros((2, 2), np.float32)
    )
    columns = {"query_id": ["q2", "q1", "q1"], "gallery_id": ["g10", "g10", "g2"], "logit": [1.5, 9.0, -2.0]}
    pairs = tables.conform(pa.table(columns), "pair_distances")
    expected = np.array([[-2.0, np.nan], [1.5, np.nan]], np.float32)
    logits = candidates.aligned_logits([pairs], catalogue, lists)
    assert catalogue.ids.tolist() == ["g1", "g10", "g2", "q1", "q2"]
    assert np.array_equal(logits.numpy(), expected, equal_nan=True)
    assert candidates.aligned_logits([pairs.slice(0, 0)], catalogue, lists).isnan().all()
    back = candidates.pairs_table(lists, logits, catalogue.ids)
    assert back.to_pylist() == [pairs.to_pylist()[row] for row in (2, 0)]
    with pytest.raises(BadInput, match="two logits"):
        candidates.aligned_logits([pairs, pairs], catalogue, lists)
