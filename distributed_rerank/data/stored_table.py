"""The columns of a catalogue's table as they are read, batch by batch: repeated texts are codes from the first row on.

Only the columns that a catalogue knows are read; others, the index that pandas writes among them, are ignored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from distributed_rerank.data.catalogue_checks import BOX
from distributed_rerank.data.csv_files import regrouped
from distributed_rerank.data.table_files import TableFile
from distributed_rerank.data.text_codes import CodeBuilder
from distributed_rerank.data.text_columns import as_texts
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory

KNOWN = ("id", "path", "label", "split", "is_query", "is_gallery", "category", "sequence", "item", *BOX)
CODED = ("label", "split", "is_query", "is_gallery", "category", "sequence", "item")
"""Columns in which a text may be that of many rows."""
_ROWS = 1 << 16
"""Rows that are read together."""
_BATCHES_BETWEEN = 4
"""After so many, freed memory goes back to the system."""


class StoredColumn:
    """The cells of a column as they are stored."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind
        self._chunks: list[pa.Array] = []

    def add(self, cells: pa.Array) -> None:
        """The next rows."""
        self._chunks.append(cells)

    def cells(self) -> pa.ChunkedArray:
        """All of them; afterwards this holds none."""
        chunks, self._chunks = self._chunks, []
        return pa.chunked_array(chunks, self.kind)

    def texts(self, name: str) -> pa.Array:
        """`as_texts` of all cells; afterwards this holds none."""
        return as_texts(self.cells(), name)


class CodedColumn:
    """The texts of a column as codes."""

    def __init__(self, name: str, kind: pa.DataType) -> None:
        self.kind = kind
        self._name, self._codes = name, CodeBuilder()
        self._error: BadInput | None = None
        self.add(pa.array([], kind))  # a type without texts is refused in a table without rows too

    def add(self, cells: pa.Array) -> None:
        """The next rows."""
        if self._error is None:
            try:
                self._codes.add(as_texts(cells, self._name))
            except BadInput as error:
                self._error = error

    def texts(self, name: str) -> pa.DictionaryArray:
        """All rows, see `text_codes`; afterwards this holds none. Raises BadInput as `as_texts` does."""
        if self._error is not None:
            raise self._error
        return self._codes.finish()


class StoredTable(NamedTuple):
    """The known columns of a table, and the names of all its columns."""

    columns: dict[str, Any]
    names: Sequence[str]
    n_rows: int

    def with_constants(self, **values: str) -> "StoredTable":
        """The same with these texts in all rows of these columns, whatever the table has there."""
        columns = dict(self.columns)
        for name, value in values.items():
            columns[name] = CodedColumn(name, pa.string())
            columns[name].add(pa.repeat(pa.scalar(value), self.n_rows))
        return StoredTable(columns, [*self.names, *values], self.n_rows)


def load_table(uri: str, schemes: frozenset[str]) -> StoredTable:
    """The columns of `KNOWN` in a CSV (as text) or Parquet table; the first bytes tell which it is.

    Raises BadInput for a file that is neither, for a column of `KNOWN` that is there twice, and as CSV is checked.
    """
    file = TableFile(uri, schemes, "catalogue", "neither a readable CSV nor a Parquet table")
    all_names: list[str] = []

    def choose(names: Sequence[str]) -> list[str]:
        all_names.extend(names)
        repeated = next((name for name in KNOWN if names.count(name) > 1), None)
        if repeated is not None:
            raise BadInput(f"{uri}: {names.count(repeated)} columns are called {repeated!r}; keep one of them")
        return [name for name in KNOWN if name in names]

    tables = file.parquet_batches(choose, _ROWS) if file.is_parquet else file.csv_batches(choose, set(KNOWN), _ROWS)
    columns = {field.name: _column(field.name, field.type) for field in next(tables).schema}
    n_rows = 0
    for number, table in enumerate(regrouped(tables, _ROWS)):
        if number % _BATCHES_BETWEEN == 0:
            give_back_memory()  # the blocks of the file leave holes that no column fits in
        n_rows += len(table)
        whole = table.combine_chunks()
        for name, column in columns.items():
            for chunk in whole[name].chunks:
                column.add(chunk)
    return StoredTable(columns, all_names, n_rows)


def _column(name: str, kind: pa.DataType) -> StoredColumn | CodedColumn:
    return CodedColumn(name, kind) if name in CODED else StoredColumn(kind)
