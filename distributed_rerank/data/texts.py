"""Columns of many texts in Arrow's memory: a text is a Python object only while somebody holds it."""

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int, Int64

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

ROWS = 1 << 16
"""Texts that are looked at together."""
_ROWS_OF_SHELF = 1 << 12


class Texts(Sequence[str]):
    """A column of ids. What is asked for comes as str, or as an object array of str."""

    def __init__(self, texts: Any) -> None:
        """`texts`: whatever Arrow makes a column of; without null."""
        self.column = as_column(texts)

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, places: Any) -> Any:
        """The text at a place, or those of a slice, of places, or of a mask, as an object array."""
        if isinstance(places, slice):
            return self.column[places].to_numpy(zero_copy_only=False)
        places = np.asarray(places)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        if places.ndim == 0:
            return self.column[int(places)].as_py()
        return self.column.take(pa.array(places.ravel())).to_numpy(zero_copy_only=False).reshape(places.shape)

    def __iter__(self) -> Iterator[str]:
        for part in parts_of(self.column):
            yield from part.to_pylist()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.column.to_numpy(zero_copy_only=False)

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return self.column if type is None else self.column.cast(type)

    def take(self, places: Int[np.ndarray, " text"]) -> pa.Array:
        """The texts at these places as an Arrow column of strings."""
        return self.column.take(pa.array(places)).cast(pa.string())

    def tolist(self) -> list[str]:
        """All of them."""
        return self.column.to_pylist()

    def places_of(self, texts: Any) -> Int64[np.ndarray, " text"]:
        """The place of each of these texts in this column, which must ascend without repeats; -1 = it is not there.

        Only the texts asked for, and one shelf of the column at a time, are ever hashed.
        """
        distinct = as_column(texts).dictionary_encode()
        order = pc.array_sort_indices(distinct.dictionary)
        names = distinct.dictionary.take(order)
        # [name]: the places of the distinct names, found shelf by shelf; both sides ascend. One more for null.
        found = np.full(len(names) + 1, -1, np.int64)
        start = 0
        while start < len(names):
            shelf = self._shelf_of(names[start].as_py())
            stop = len(names)
            if shelf + _ROWS_OF_SHELF < len(self):
                following = self.column[shelf + _ROWS_OF_SHELF].as_py()
                stop = bisect.bisect_left(range(stop), following, start, key=lambda place: names[place].as_py())
            on_shelf = pc.index_in(names[start:stop], value_set=self.column[shelf : shelf + _ROWS_OF_SHELF])
            places = on_shelf.fill_null(-1 - shelf).to_numpy().astype(np.int64) + shelf
            found[order[start:stop].to_numpy().astype(np.int64)] = places
            start = stop
        return found[distinct.indices.fill_null(len(names)).to_numpy()]

    def _shelf_of(self, name: str) -> int:
        """Where the shelf begins that holds this name, if any does."""
        shelves = range(0, len(self), _ROWS_OF_SHELF)
        return max(0, bisect.bisect_right(shelves, name, key=lambda row: self.column[row].as_py()) - 1) * _ROWS_OF_SHELF


def as_column(texts: Any) -> pa.Array:
    """These texts as one Arrow array of large_string; None and NaN are null."""
    if isinstance(texts, Texts):
        return texts.column
    if not isinstance(texts, pa.Array | pa.ChunkedArray):
        texts = pa.array(texts, from_pandas=True)
    if isinstance(texts, pa.ChunkedArray):
        # One chunk is taken as it is; joining would copy it.
        texts = texts.chunk(0) if texts.num_chunks == 1 else texts.combine_chunks()
    return texts.cast(pa.large_string())


def parts_of(column: Any, rows: int | None = None) -> Iterator[Any]:
    """The column in parts of so many rows, by default `ROWS`."""
    rows = rows or ROWS
    return (column[start : start + rows] for start in range(0, len(column), rows))


def json_of_parts(parts: Iterable[Any]) -> Iterator[str]:
    """The JSON list of a column that comes in parts, none of them empty, as json.dumps writes it without blanks."""
    yield "["
    for number, part in enumerate(parts):
        if pa.types.is_dictionary(part.type):
            part = part.cast(part.type.value_type)
        yield ("," if number else "") + json.dumps(part.to_pylist(), separators=(",", ":"), allow_nan=False)[1:-1]
    yield "]"


def json_of_columns(columns: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """The JSON object of columns by name, as json.dumps writes it with sorted keys."""
    yield "{"
    for number, (name, column) in enumerate(sorted(columns, key=lambda named: named[0])):
        yield f"{',' if number else ''}{json.dumps(name)}:"
        yield from json_of_parts(parts_of(pa.array(column, from_pandas=True)))
    yield "}"


def as_series(texts: pa.Array) -> pd.Series:
    """A column of texts that stays in Arrow's memory."""
    return pd.Series(pd.arrays.ArrowExtensionArray(texts))
