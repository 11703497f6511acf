"""The Parquet tables between stages: exact schemas, atomic writers, checking readers.

Every table is keyed by ids. Readers take a file, a URI, or a folder: `folder/<table>.parquet`, else the
Parquet files in `folder/<table>/`, else those in `folder` itself. Columns that are missing or unknown raise
BadInput, and so does a file of a finished folder that is gone or has changed since it was written.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32

from distributed_rerank.data.schemas import MAY_BE_NULL, SCHEMAS
from distributed_rerank.data.text_columns import are_words_for_no_value, as_names, as_texts, float_bits, is_index_column
from distributed_rerank.data.texts import as_column
from distributed_rerank.data.vectors import is_own_layout, write_vectors
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations, manifests, paths
from distributed_rerank.storage.files import atomic_path

_LARGEST_SQUARED = 2.0**120
"""Longer embeddings would overflow float32 when squared, as `tensors.candidate_pairs` says."""


def conform(table: pa.Table, name: str, source: str = "this table") -> pa.Table:
    """`table` with exactly the columns, order and types of the schema `name`.

    `per_query` may have further columns, its metrics, which become float64. Ranks count from 1. In
    `per_query` a first hit is a rank, null where no relevant item was retrieved. Raises BadInput naming the
    columns that do not fit.
    """
    schema = SCHEMAS[name]
    missing = [column for column in schema.names if column not in table.column_names]
    extra = [column for column in table.column_names if column not in schema.names]
    if missing or (extra and name != "per_query"):
        raise BadInput(f"{source}: columns missing {missing}, unknown {extra}; {name} needs {schema.names}")
    if name == "per_query":
        schema = pa.schema([*schema, *(pa.field(column, pa.float64()) for column in extra)])
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise BadInput(f"{source}: not a table of {name}: {error}; needed types: {_line(schema)}") from error
    for column in SCHEMAS[name].names:
        if column not in MAY_BE_NULL and table[column].null_count:
            raise BadInput(f"{source}: {table[column].null_count} empty cells in column {column!r}; fill them")
    return table


def write_table(path: str | Path, table: pa.Table, name: str) -> None:
    """Write a table of the schema `name` (see `conform`), atomically, without time stamps."""
    with atomic_path(path) as temporary:
        pq.write_table(conform(table, name), temporary)


def write_batches(path: str | Path, batches: Iterable[pa.Table], name: str) -> int:
    """`write_table` of tables one after the other, one in memory at a time; the number of rows."""
    rows = 0
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMAS[name]) as writer:
        for batch in batches:
            writer.write_table(conform(batch, name))
            rows += len(batch)
    return rows


def read_batches(path: str | Path, name: str, rows: int) -> Iterator[pa.Table]:
    """`read_table` of a file or folder in tables of `rows` rows each."""
    return (conform(batch, name, str(path)) for batch in load_batches(path, name, rows))


def read_table(path: str | Path, name: str) -> pa.Table:
    """Read a table of the schema `name` (see `conform`) from a file, URI or folder, in the order stored."""
    return conform(load_parquet(path, name), name, str(path))


def embeddings_table(ids: Any, embeddings: Float32[np.ndarray, "item dim"]) -> pa.Table:
    """The embeddings table of these rows: `id, embedding` (fixed-size list of float32)."""
    assert len(ids) == len(embeddings), f"{len(ids)} ids for {len(embeddings)} embeddings"
    values = pa.array(np.ascontiguousarray(embeddings).reshape(-1), pa.float32())
    column = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    return pa.table({"id": as_column(ids).cast(pa.string()), "embedding": column})


def write_embeddings(path: str | Path, ids: Any, embeddings: Float32[np.ndarray, "item dim"]) -> None:
    """Write `id, embedding`, atomically, in the order given."""
    write_vectors(path, embeddings.shape[1], [embeddings_table(ids, embeddings)])


def matrix_of(table: pa.Table) -> Float32[np.ndarray, "item dim"]:
    """The embeddings of an embeddings table."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)


def read_embeddings(path: str | Path) -> tuple[np.ndarray, Float32[np.ndarray, "item dim"]]:
    """Ids (object array) and embeddings, in the order stored, from a file, URI or folder.

    Ids are text; numbers are read as those of a catalogue. Lists of any float type are accepted where all have one
    length. Raises BadInput for empty and repeated ids and for embeddings that are not finite or longer than 2^60.
    """
    table = load_parquet(path, "embeddings")
    names = [name for name in table.column_names if not is_index_column(name)]
    if sorted(names) != ["embedding", "id"]:
        raise BadInput(f"{path}: columns {names}; an embeddings table has exactly id and embedding")
    try:
        ids = as_texts(table["id"], "id")
        if pa.types.is_floating(table["id"].type):  # ids that are text are those of a catalogue that was read before
            ids = as_names(ids, "id", float_bits(table["id"].type))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    is_empty = ids.is_null().to_numpy(zero_copy_only=False) | are_words_for_no_value(ids)
    if is_empty.any():
        raise BadInput(f"{path}: {is_empty.sum()} embeddings without an id, first in row {is_empty.argmax() + 1}")
    ids = ids.to_numpy(zero_copy_only=False)
    embeddings = _matrix(table["embedding"].combine_chunks(), path)
    repeated = _first_repeated(ids)
    if repeated is not None:
        raise BadInput(f"{path}: id {repeated!r} has two embeddings; keep one")
    bad = ~(np.einsum("ij,ij->i", embeddings, embeddings, dtype=np.float64) < _LARGEST_SQUARED)  # NaN is none
    if bad.any():
        raise BadInput(
            f"{path}: {bad.sum()} embeddings are not finite or longer than 2^60, first that of {ids[bad][0]!r}; "
            "recompute them"
        )
    return ids, embeddings


def load_parquet(path: str | Path, name: str) -> pa.Table:
    """All columns of a Parquet file, URI or folder, unchecked; `name` is the table wanted of a folder."""
    text = str(path)
    try:
        if paths.scheme_of(text) is not None:
            return pq.read_table(io.BytesIO(locations.read_bytes(text)))
        return pa.concat_tables([pq.ParquetFile(file).read() for file in files_of(Path(path), name)])
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"cannot read {text} as a Parquet table of {name}: {error}") from error


def load_batches(
    path: str | Path | io.BufferedIOBase, name: str, rows: int, source: str | None = None
) -> Iterator[pa.Table]:
    """`load_parquet` of a file, open file or folder in tables of `rows` rows each; only a file's last is shorter."""
    try:
        for file in files_of(Path(path), name) if isinstance(path, str | Path) else [path]:
            held, size = [], 0
            # With pre_buffer all that was read stays in memory to the end.
            with pq.ParquetFile(file, pre_buffer=False) as parquet:
                for batch in parquet.iter_batches(batch_size=rows):
                    held, size = [*held, batch], size + len(batch)
                    if size >= rows:
                        yield pa.Table.from_batches(held)
                        held, size = [], 0
            if held:
                yield pa.Table.from_batches(held)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"cannot read {source or path} as a Parquet table of {name}: {error}") from error


def files_of(path: Path, name: str) -> list[Path]:
    """The Parquet files of the table, compared with the manifest of their folder where it has one.

    Embeddings that another program has rewritten are not compared: see `is_rewritten`.
    """
    whole = path / f"{name}.parquet"
    if name == "embeddings" and is_rewritten(path):
        return [whole if path.is_dir() else path]
    files = [path]
    if path.is_dir():
        manifests.check_files(path, [f"{name}.parquet"])
        parts = sorted((path / name).glob("[!.]*.parquet")) or sorted(path.glob("[!.]*.parquet"))
        files = [whole] if whole.is_file() else parts
    if not files:
        raise BadInput(f"{path} holds no Parquet files of {name}; give the folder that the earlier job wrote")
    manifests.check_paths(files)
    return files


def is_rewritten(path: Path) -> bool:
    """Whether another program has written the embeddings anew, such as to tune them, in this folder of `embed` or file.

    It is then a whole Parquet file of another size and in another layout than ours. Damage leaves the size or no such
    file, and a file of another run of ours has our layout.
    """
    file = path / "embeddings.parquet" if path.is_dir() else path
    return manifests.has_other_size(file) and not is_own_layout(file)


def _matrix(column: pa.Array, path: str | Path) -> Float32[np.ndarray, "item dim"]:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    if not (
        pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    ):
        raise BadInput(f"{path}: column embedding is {column.type}; a list of floats is needed")
    lengths = pc.call_function("list_value_length", [column]).unique().to_pylist()
    if len(lengths) != 1 or lengths[0] in (None, 0):
        raise BadInput(
            f"{path}: embeddings of lengths {sorted(lengths, key=str)}; all must have the same length, not 0"
        )
    values = column.flatten().cast(pa.float32())
    if values.null_count:
        raise BadInput(f"{path}: {values.null_count} embedding values are null; recompute them")
    return np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(-1, lengths[0])


def _first_repeated(ids: np.ndarray) -> str | None:
    seen, counts = np.unique(ids.astype(object), return_counts=True)
    return seen[counts > 1][0] if (counts > 1).any() else None


def _line(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
