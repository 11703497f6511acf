from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_rerank.data import tables
from distributed_rerank.data.schemas import SCHEMAS
from distributed_rerank.errors import BadInput


def _per_query() -> pa.Table:
    return pa.table(
        {
            "query_id": ["a", "b"], "label": ["1", None], "category": pa.array([None, None], pa.null()),
            "n_relevant": [1, 2], "first_hit_before": [3, None], "first_hit_after": [1, 2],
            "map@10_before": pa.array([0.25, 0.5], pa.float32()), "map@10_after": [1, 0],
        }
    )  # fmt: skip


def test_per_query_keeps_free_metric_columns_as_float64(tmp_path: Path) -> None:
    tables.write_table(tmp_path / "per_query.parquet", _per_query(), "per_query")
    back = tables.read_table(tmp_path, "per_query")
    assert back.schema.field("map@10_before").type == back.schema.field("map@10_after").type == pa.float64()
    assert back.schema.names[:6] == SCHEMAS["per_query"].names
    assert back["first_hit_before"].to_pylist() == [3, None]
    assert back["map@10_after"].to_pylist() == [1.0, 0.0]


def test_written_twice_gives_the_same_bytes_and_no_temporary(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        tables.write_table(tmp_path / name, _per_query(), "per_query")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": ["a"], "path": ["p"], "stage": ["s"]}, r"missing \['reason'\]"),
        ({"id": ["a"], "path": ["p"], "stage": ["s"], "reason": ["r"], "x": [1]}, r"unknown \['x'\]"),
        ({"id": [None], "path": ["p"], "stage": ["s"], "reason": ["r"]}, "1 empty cells in column 'id'"),
        ({"id": [[1]], "path": ["p"], "stage": ["s"], "reason": ["r"]}, "not a table of rejects"),
    ],
)
def test_columns_that_do_not_fit_are_bad_input(columns: dict, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        tables.conform(pa.table(columns), "rejects")


def test_embeddings_round_trip_is_exact(tmp_path: Path) -> None:
    embeddings = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    ids = np.array(["e", "a", "ü", "c", "d"], dtype=object)
    tables.write_embeddings(tmp_path / "embeddings.parquet", ids, embeddings)
    tables.write_table(tmp_path / "rejects.parquet", pa.table({n: ["x"] for n in SCHEMAS["rejects"].names}), "rejects")
    assert pq.read_schema(tmp_path / "embeddings.parquet").field("embedding").type == pa.list_(pa.float32(), 3)
    for path in (tmp_path, tmp_path / "embeddings.parquet", f"file://{tmp_path}/embeddings.parquet"):
        back_ids, back = tables.read_embeddings(path)
        assert back_ids.tolist() == ids.tolist()
        assert np.array_equal(back, embeddings)
        assert back.dtype == np.float32


def test_embeddings_of_a_folder_of_parts_and_of_other_float_types(tmp_path: Path) -> None:
    embeddings = np.arange(12, dtype=np.float32).reshape(4, 3)
    ids = np.array(list("abcd"), dtype=object)
    (tmp_path / "embeddings").mkdir()
    for part, rows in (("block-00000001", slice(2, 4)), ("block-00000000", slice(0, 2))):
        table = tables.embeddings_table(ids[rows], embeddings[rows])
        pq.write_table(table, tmp_path / "embeddings" / f"{part}.parquet")
    for path in (tmp_path, tmp_path / "embeddings"):
        assert np.array_equal(tables.read_embeddings(path)[1], embeddings)
    loose = pa.table({"id": ids, "embedding": pa.array(embeddings.tolist(), pa.list_(pa.float64()))})
    pq.write_table(loose, tmp_path / "loose.parquet")
    assert np.array_equal(tables.read_embeddings(tmp_path / "loose.parquet")[1], embeddings)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": ["a", "a"], "embedding": [[1.0], [2.0]]}, "id 'a' has two embeddings"),
        ({"id": ["a", "b"], "embedding": [[1.0], [2.0, 3.0]]}, "same length"),
        (
            {"id": ["a", "b"], "embedding": [[1.0], [float("nan")]]},
            r"1 embeddings are not finite or longer than 2\^60, first that of 'b'",
        ),
        ({"id": ["a"], "embedding": [[None]]}, "null"),
        ({"id": ["a"], "embedding": [1.0]}, "a list of floats is needed"),
        ({"id": ["a"], "vector": [[1.0]]}, "exactly id and embedding"),
    ],
)
def test_broken_embeddings_are_bad_input(tmp_path: Path, columns: dict, expected: str) -> None:
    if columns.get("embedding") == [[None]]:
        columns = {**columns, "embedding": pa.array([[None]], pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    with pytest.raises(BadInput, match=expected):
        tables.read_embeddings(tmp_path / "e.parquet")


def test_missing_or_broken_files_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        tables.read_table(tmp_path / "absent.parquet", "rejects")
    with pytest.raises(BadInput, match="holds no Parquet files of rejects"):
        tables.read_table(tmp_path, "rejects")
    (tmp_path / "rejects.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(BadInput, match="cannot read"):
        tables.read_table(tmp_path, "rejects")
