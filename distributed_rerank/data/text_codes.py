"""Columns of repeated texts: each text once, and a number a row, from the first batch of a table on.

A column with codes is a DictionaryArray: int32 codes, null where a row has no text, and names of large_string, all
different, none of them null, in the order of their first rows.
"""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int, Int32

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

_INTEGER = "^-?[0-9]{1,18}$"
_FEW_NAMES = 1 << 16


class CodeBuilder:
    """Makes a column with codes of texts that come batch by batch; memory is that of the codes and the names."""

    def __init__(self) -> None:
        self._codes: list[pa.Array] = []
        self._names = pa.array([], pa.large_string())
        self._waiting: list[pa.DictionaryArray] = []
        self._n_waiting = 0

    def add(self, texts: pa.Array) -> None:
        """The next rows."""
        coded = texts.dictionary_encode()
        self._waiting.append(coded)
        self._n_waiting += len(coded.dictionary)
        # All names are looked through only when as many have come as there are, so that each is a few times.
        if self._n_waiting > max(_FEW_NAMES, len(self._names)):
            self._number()

    def finish(self) -> pa.DictionaryArray:
        """All rows in one piece."""
        self._number()
        codes = pa.concat_arrays([pa.array([], pa.int32()), *self._codes])
        self._codes = []
        return pa.DictionaryArray.from_arrays(codes, self._names)

    def _number(self) -> None:
        """Number the names of the batches that wait; those that have numbers keep them."""
        known = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self._names)
        numbered = pa.chunked_array([known, *self._waiting]).unify_dictionaries()
        self._names = numbered.chunk(0).dictionary
        self._codes += [chunk.indices for chunk in numbered.chunks[1:]]
        self._waiting, self._n_waiting = [], 0


def constant_codes(text: str | None, rows: int) -> pa.DictionaryArray:
    """A column of `rows` rows with this text in all of them; None: it has none."""
    if text is None:
        return pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int32()), pa.array([], pa.large_string()))
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text], pa.large_string()))


def rows_with(column: pa.DictionaryArray, is_asked: Bool[np.ndarray, " name"]) -> Bool[np.ndarray, " row"]:
    """Where the name of a row is one of those asked for; a row without a name is none."""
    return np.append(is_asked, False)[codes_of(column)]


def without_names(column: pa.DictionaryArray, is_left_out: Bool[np.ndarray, " name"]) -> pa.DictionaryArray:
    """The column in which rows with these names have none."""
    place_of = np.where(is_left_out, -1, np.cumsum(~is_left_out) - 1)
    return renumbered(column, place_of, column.dictionary.filter(pa.array(~is_left_out)))


def filled_codes(column: pa.DictionaryArray, text: str) -> pa.DictionaryArray:
    """The column with this text in the rows that have none; no other row has it."""
    if not column.null_count:
        return column
    names = pa.concat_arrays([column.dictionary, pa.array([text], pa.large_string())])
    return pa.DictionaryArray.from_arrays(column.indices.fill_null(len(names) - 1), names)


def renumbered(
    column: pa.DictionaryArray, place_of: Int[np.ndarray, " name"], names: pa.Array, ordered: bool = False
) -> pa.DictionaryArray:
    """The column with `names[place_of[code]]` where it has a code; -1 = no name."""
    # One more entry at the end, for the rows without a name, whose code is -1.
    codes = np.append(place_of, -1).astype(np.int32)[codes_of(column)]
    is_none = codes < 0
    return pa.DictionaryArray.from_arrays(
        pa.array(codes, mask=is_none if is_none.any() else None), names, ordered=ordered
    )


def ordered_codes(texts: Any, by_value: bool = False) -> pa.DictionaryArray:
    """These texts as int32 codes into the distinct ones that occur, which are in code-point order; null stays null.

    With `by_value` they are in the order of their values where all are integers. The type says `ordered`.
    """
    column = _one_chunk(pa.array(texts, from_pandas=True))
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string()).dictionary_encode()
    is_used = np.zeros(len(column.dictionary) + 1, bool)
    is_used[codes_of(column)] = True  # the last is that of rows without a text
    used = np.flatnonzero(is_used[:-1])
    names = column.dictionary.take(pa.array(used))
    order = pc.array_sort_indices(names)
    if by_value and pc.all(pc.match_substring_regex(names, _INTEGER)).as_py() is not False:
        order = order.take(pc.array_sort_indices(names.take(order).cast(pa.int64())))
    place_of = np.full(len(column.dictionary), -1, np.int32)
    place_of[used[order.to_numpy()]] = np.arange(len(used))
    return renumbered(column, place_of, names.take(order), ordered=True)


def in_order_of_rows(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """The column with its names in the order of their first rows."""
    used = column.indices.unique().drop_null().to_numpy()
    place_of = np.full(len(column.dictionary), -1, np.int32)
    place_of[used] = np.arange(len(used))
    return renumbered(column, place_of, column.dictionary.take(pa.array(used)))


def known_codes(texts: Any) -> pa.DictionaryArray | None:
    """The column of a table as it is, if `ordered_codes` has made it; else None."""
    if not isinstance(texts.dtype, pd.ArrowDtype) or not getattr(texts.dtype.pyarrow_dtype, "ordered", False):
        return None
    return _one_chunk(pa.array(texts, from_pandas=True))


def codes_of(column: pa.DictionaryArray) -> Int32[np.ndarray, " text"]:
    """The codes of a column, on its memory where none is null; -1 = null."""
    codes = column.indices if not column.null_count else column.indices.fill_null(-1)
    return codes.to_numpy(zero_copy_only=False)


def _one_chunk(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()
    return column
