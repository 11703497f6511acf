"""Embeddings in Parquet files whose values lie in one piece: some rows are read without reading the others.

`write_vectors` makes one uncompressed page of each row group's embeddings. Any Parquet reader reads such a file; here
the place of a row's values is computed from the file's metadata, and whoever needs some rows maps them for a moment.

Another run may add to the embeddings meanwhile, and replaces the file. Rows then lie elsewhere, so every read asks
whether the file is still the one whose metadata were read.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from jaxtyping import Float32

from distributed_rerank.data.csv_files import regrouped
from distributed_rerank.data.text_columns import are_words_for_no_value
from distributed_rerank.data.texts import as_column
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.storage.files import atomic_path
from distributed_rerank.tensors import sharding

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

ROWS_PER_GROUP = 1 << 14
"""Embeddings that are written, and read, together."""
LAYOUT: dict[str, Any] = {
    "compression": "none",
    "use_dictionary": ["id"],
    "data_page_size": 1 << 30,
    "max_rows_per_page": 1 << 30,
}
"""How a Parquet file is written so that the embeddings of a row group are one page."""
_ROWS_PER_COPY = 1 << 10
_HEADER = 256
"""More bytes than a page has before its levels."""


class _Part(NamedTuple):
    """A row group: where its values are, and which of all rows it begins with; `footer` tells its file from others."""

    path: Path
    footer: bytes
    row_group: int
    offset: int
    start: int
    n_rows: int


class StoredVectors:
    """Embeddings [row, dim] on disk, ids ascending. It pickles as names of files and numbers.

    Reading raises BadInput where a file has been replaced since.
    """

    def __init__(self, parts: Sequence[_Part], dim: int) -> None:
        self._parts = parts
        self._starts = np.array([part.start for part in parts], np.int64)
        self.shape = (sum(part.n_rows for part in parts), dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Float32[np.ndarray, "row dim"]:
        """A copy of a slice, or of these rows in the order given."""
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if len(rows) > ROWS_PER_GROUP:
            # A tile of before may have lain among freed memory of the heap, which keeps it.
            give_back_memory()
        found = np.empty((len(rows), self.shape[1]), np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(part_of).tolist():
            places, part = np.flatnonzero(part_of == number), self._parts[number]
            # Mapped for this copy alone: pages that stay mapped would count as this process's memory.
            with _opened(part) as file:
                values = np.memmap(file, np.float32, "r", part.offset, (part.n_rows, self.shape[1]))
            for start, stop in sharding.blocks(len(places), _ROWS_PER_COPY):
                some = places[start:stop]
                found[some] = values[rows[some] - part.start]
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self[:]

    def id_parts(self) -> Iterator[pa.Array]:
        """The ids, one row group at a time."""
        for part in self._parts:
            with _opened(part) as file, pq.ParquetFile(file) as table:
                yield as_column(table.read_row_group(part.row_group, columns=["id"], use_threads=False)["id"])


def _opened(part: _Part) -> BinaryIO:
    """The file of a part. What is mapped or read through it stays what it is, whatever takes the file's place."""
    with contextlib.suppress(FileNotFoundError):
        file = open(part.path, "rb")
        if _footer(file) == part.footer:
            return file
        file.close()
    raise BadInput(
        f"{part.path}: another run has changed these embeddings while this one read them; start this one again, and it "
        "goes on where it was"
    )


def _footer(file: BinaryIO) -> bytes:
    """A digest of a Parquet file's metadata: places, sizes, and least and largest value of each column of a row group.

    Unlike a time of change it is the same on every machine, and for a file that was written anew with the same rows.
    """
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, n_bytes - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, n_bytes - 8 - length))
    return hashlib.sha256(file.read()).digest()


def write_vectors(path: str | Path, dim: int, tables: Iterable[pa.Table]) -> None:
    """Write embeddings tables one after the other as one file, atomically; the same bytes however they were cut."""
    schema = pa.schema({"id": pa.string(), "embedding": pa.list_(pa.float32(), dim)})
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, **LAYOUT) as writer:
        for table in regrouped(tables, ROWS_PER_GROUP):
            writer.write_table(table.cast(schema).combine_chunks(), row_group_size=ROWS_PER_GROUP)
            # A row group takes six times its own bytes; what has grown in pieces would stay in the allocator.
            give_back_memory()


def stored_vectors(files: Sequence[Path]) -> StoredVectors | None:
    """The embeddings in these files where they can be read in place; None: another program wrote them, or they are bad.

    Ids must be text, ascend from file to file and be there, values must be finite.
    """
    try:
        found = _in_place(files)
        return found if found is not None and _are_good(found) else None
    except (OSError, pa.ArrowException):
        return None  # whoever reads the table says what is wrong with it


def is_own_layout(path: Path) -> bool:
    """Whether `write_vectors` may have written the file; True also for one that is no Parquet file, or no more."""
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    except (OSError, pa.ArrowException):
        return True
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return all(column.compression == "UNCOMPRESSED" for column in columns)


def _in_place(files: Sequence[Path]) -> StoredVectors | None:
    parts: list[_Part] = []
    dims: set[int] = set()
    for path in files:
        with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
            footer, schema = _footer(opened), file.schema_arrow
            if schema.names != ["id", "embedding"] or not pa.types.is_fixed_size_list(schema.field("embedding").type):
                return None
            if schema.field("id").type != pa.string() or schema.field("embedding").type.value_type != pa.float32():
                return None
            dims.add(schema.field("embedding").type.list_size)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                offset = _offset(opened, group, schema.field("embedding").type.list_size)
                if offset is None:
                    return None
                start = parts[-1].start + parts[-1].n_rows if parts else 0
                parts.append(_Part(path.absolute(), footer, number, offset, start, group.num_rows))
    return StoredVectors(parts, dims.pop()) if len(dims) == 1 else None


def _offset(file: BinaryIO, group: Any, dim: int) -> int | None:
    """Where the embeddings of a row group begin in their file; None: they are not one plain page without null."""
    column, n_bytes = group.column(1), group.num_rows * dim * 4
    is_plain = column.compression == "UNCOMPRESSED" and not column.has_dictionary_page
    has_null = column.statistics is None or column.statistics.null_count != 0
    if not is_plain or has_null or column.num_values != group.num_rows * dim:
        return None
    file.seek(column.data_page_offset)
    in_page = _first_page_bytes(file.read(_HEADER))
    if in_page is None or in_page < n_bytes or not 0 < column.total_compressed_size - in_page < _HEADER:
        return None
    return column.data_page_offset + column.total_compressed_size - n_bytes


def _first_page_bytes(header: bytes) -> int | None:
    """The length of a data page by its header (Thrift's compact protocol): the third of three 32-bit fields."""
    place, fields = 0, []
    for _ in range(3):
        if header[place] != 0x15:
            return None
        value, shift, place = 0, 0, place + 1
        while header[place] & 0x80:
            value, shift, place = value | (header[place] & 0x7F) << shift, shift + 7, place + 1
        value, place = value | header[place] << shift, place + 1
        fields.append(value >> 1)  # zigzag of a number that is not negative
    return fields[2] if fields[0] == 0 else None


def _are_good(vectors: StoredVectors) -> bool:
    last = None
    for number, ids in enumerate(vectors.id_parts()):
        is_bad = ids.null_count or are_words_for_no_value(ids).any() or pc.any(pc.equal(ids, "")).as_py()
        if is_bad or (last is not None and last >= ids[0].as_py()) or pc.any(pc.less_equal(ids[1:], ids[:-1])).as_py():
            return False
        part = vectors._parts[number]
        if not np.isfinite(vectors[part.start : part.start + part.n_rows]).all():
            return False
        last = ids[-1].as_py()
    return True
