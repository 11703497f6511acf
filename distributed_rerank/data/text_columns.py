"""Read a column of any table as text, so that one table gives the same names from CSV and from Parquet.

CSV holds text alone. A Parquet column is read as the text that pandas writes of it to CSV, so integers never pass
through a float. Names stay as they are written: `01`, `-0`, `1e5`, `0x1` and `7.50` are names. There is one exception.
pandas turns a column of integers with gaps into floats, and writes 7 as `7.0`. So a column in which every value is a
whole number exactly as Python writes floats (`7.0`, `-3.0`, `1e+16`) loses the `.0`. In CSV such a column cannot be
told from one of texts, so a Parquet column of texts follows the same rule.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Float64

from distributed_rerank.data.texts import parts_of
from distributed_rerank.errors import BadInput

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

_NO_VALUE = (
    "nan", "-nan", "nat", "null", "none", "<na>", "n/a", "#n/a", "#na", "#n/a n/a", "\\n",
    "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "n.a.", "nil", "undefined", "(null)", "<null>",
    "#name?", "#ref!", "#value!", "#div/0!", "#null!", "#num!",
)  # fmt: skip
_NO_VALUE_EXACT = "NA"
"""In this spelling alone: R and pandas write it so, and `na` is a syllable."""
_ROWS = 1 << 16
"""Texts that are looked at together."""
_UNSEEN = r"[\pZ\pC]+"
"""Spaces, and characters without any shape, such as the zero-width space."""
_INDEX_COLUMN = re.compile(r"|Unnamed: \d+(_level_\d+)?|__index_level_\d+__|index|level_\d+")
_EXACT_INTEGERS = {16: 1 << 11, 32: 1 << 24, 64: 1 << 53}
"""From here on neighbouring whole numbers are the same float, by the float's bits."""
_WHOLE_FLOAT = re.compile(r"-?([0-9]+\.0|[0-9](\.[0-9]+)?e\+[0-9]+)")
_SHORT_WHOLE_FLOAT = r"^-?(0|[1-9][0-9]{0,14})\.0$"


def is_index_column(name: str) -> bool:
    """Whether pandas writes a column of this name for the index of a table; no table needs it."""
    return _INDEX_COLUMN.fullmatch(name) is not None


def as_texts(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """The column's cells as pandas writes them to CSV [row], as large_string; empty and blank cells are null.

    Raises BadInput, naming the column `name`, for types without one text, such as lists and time stamps.
    """
    parts = []
    for chunk in _chunks_of(column):
        try:
            texts = _texts_of(chunk)
        except pa.ArrowInvalid as error:
            raise BadInput(f"column {name!r} holds bytes that are not UTF-8; write it as text") from error
        if texts is None:
            raise BadInput(f"column {name!r} has the type {column.type}; write it as text")
        parts.append(_without_blanks(texts))
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)


def are_words_for_no_value(texts: pa.Array) -> Bool[np.ndarray, " row"]:
    """Where a text stands for "no value": `NULL`, `None`, `nan`, `NA`, `\\N`, `<NA>` and their like."""
    return _in_parts(_are_words, texts)


def _are_words(texts: pa.Array) -> Bool[np.ndarray, " row"]:
    found = np.zeros(len(texts), bool)
    # Only short texts are looked at closely, since most paths and ids are longer.
    short = np.flatnonzero(_filled(pc.less_equal(pc.binary_length(texts), 16)))
    words = pc.utf8_trim_whitespace(texts.take(pa.array(short)))
    is_word = pc.is_in(pc.utf8_lower(words), value_set=pa.array(_NO_VALUE, pa.large_string()))
    found[short] = _filled(is_word) | _filled(pc.equal(words, _NO_VALUE_EXACT))
    return found


def as_names(column: pa.Array | pa.DictionaryArray, name: str, float_bits: int = 64) -> Any:
    """The texts of a column of names without the `.0` of a float column; see the head of this module.

    A column with codes, see `text_codes`, comes back with the same codes. Raises BadInput for two names that are one
    number (`7` and `7.0`) or look the same, naming a row of each, and for a float column with whole numbers of a size
    that floats cannot tell apart.
    """
    texts = _distinct(column)
    _refuse_lookalikes(column, name)
    n_whole = int(_are_whole_floats(texts).sum())
    if not n_whole:
        return column
    refuse_equal_numbers({"": column}, name)
    if n_whole < len(texts) - texts.null_count:
        return column
    limit = _EXACT_INTEGERS[float_bits]
    too_large = pc.greater_equal(pc.abs(texts.cast(pa.float64())), float(limit))
    if pc.any(too_large).as_py():
        text = texts[pc.index(too_large, True).as_py()].as_py()
        raise BadInput(
            f"{name} {text!r} ({_first_place(text, {'': column})}) is a whole number of a float column; floats from "
            f"{limit} on lose their last digits, so different names may have become one; write the column as integers "
            "or text"
        )
    names = _without_points(texts)
    return pa.DictionaryArray.from_arrays(column.indices, names) if _has_codes(column) else names


def _refuse_lookalikes(column: pa.Array, name: str) -> None:
    """Raise BadInput for two different texts that nobody can tell apart.

    They differ by spaces at an end, by kinds of spaces, by characters without a shape, or in how an accent is composed.
    """
    texts = _distinct(column)
    odd = pa.concat_arrays([texts[:0], *map(_odd_texts, parts_of(texts, _ROWS))]).unique()
    if not len(odd):
        return
    shown = pc.replace_substring_regex(odd, f"^{_UNSEEN}|{_UNSEEN}$|\\p{{Cf}}+", "")
    shown = pc.utf8_normalize(pc.replace_substring_regex(shown, r"\p{Zs}", " "), "NFC")
    # Names that stay as they are differ from each other.
    changed = shown.filter(pc.not_equal(shown, odd))
    concerned = pc.is_in(shown, value_set=changed)
    seen: dict[str, str] = {}
    plain = texts.filter(pc.is_in(texts, value_set=changed)).unique()
    looks = pa.concat_arrays([plain, shown.filter(concerned)]).to_pylist()
    for text, look in zip(pa.concat_arrays([plain, odd.filter(concerned)]).to_pylist(), looks, strict=True):
        other = seen.setdefault(look, text)
        if other != text:
            places = " and ".join(f"{one!a} ({_first_place(one, {'': column})})" for one in (other, text))
            raise BadInput(f"{name} {places} look the same; write one of them in all rows")


def _odd_texts(texts: pa.Array) -> pa.Array:
    """Those with spaces at an end or letters outside ASCII."""
    is_plain = pc.equal(pc.ascii_trim_whitespace(texts), texts)
    is_plain = pc.and_(is_plain, pc.equal(pc.binary_length(texts), pc.utf8_length(texts)))
    return texts.filter(pc.invert(is_plain))


def refuse_equal_numbers(columns: Mapping[str, pa.Array], name: str) -> None:
    """Raise BadInput for two different texts that are one number in the `name` column of one or more tables.

    `columns` are the texts, with codes or without, by the table's source. Only `7.0`, as Python writes floats, is the
    same as `7`; `07` is not.
    """
    sides = [_distinct(column) for column in columns.values()]
    floats = [texts.filter(pa.array(_are_whole_floats(texts))).unique() for texts in sides]
    whole = pa.concat_arrays(floats).unique()
    numbers = _without_points(whole)
    numbers = pc.if_else(pc.equal(numbers, "-0"), pa.scalar("0", pa.large_string()), numbers)
    plain = [texts.filter(pc.is_in(texts, value_set=numbers)).unique() for texts in sides]
    if len(numbers.unique()) == len(numbers) and not any(map(len, plain)):
        return
    spellings: dict[str, set[str]] = {}
    found = (pa.concat_arrays([side, *plain]).to_pylist() for side in (numbers, whole))
    for number, text in zip(*found, strict=True):
        spellings.setdefault(number, set()).add(text)
    both = next(sorted(texts)[:2] for texts in spellings.values() if len(texts) > 1)
    places = " and ".join(f"{text!r} ({_first_place(text, columns)})" for text in both)
    raise BadInput(f"{name} {places} are the same number in two spellings; write one of them in all rows")


def without_point(text: str) -> str | None:
    """`7` for `7.0`, a whole number as Python writes floats; None for any other text."""
    if not _is_whole_float(text):
        return None
    return text.removesuffix(".0") if text.endswith(".0") else str(int(float(text)))


def float_bits(kind: pa.DataType) -> int:
    """Bits of a float type; 64 for any other type, for a text may have been a float of 64 bits."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind.bit_width if pa.types.is_floating(kind) else 64


def as_numbers(column: pa.ChunkedArray) -> Float64[np.ndarray, " row"]:
    """The values as float64; NaN where a cell is empty or not a number."""
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        return _joined(chunk.cast(pa.float64()).to_numpy(zero_copy_only=False) for chunk in column.chunks)
    if pa.types.is_boolean(kind) or _texts_of(pa.array([], kind)) is None:
        return np.full(len(column), np.nan)
    try:
        return _joined(map(_numbers_of, column.chunks))
    except pa.ArrowInvalid:  # some are no numbers
        return _joined(map(_numbers_among, column.chunks))


def _numbers_of(chunk: pa.Array) -> np.ndarray:
    texts = _texts_of(chunk)
    assert texts is not None, f"no texts are made of {chunk.type}"
    return _without_blanks(texts).cast(pa.float64()).to_numpy(zero_copy_only=False)


def _numbers_among(chunk: pa.Array) -> np.ndarray:
    texts = _texts_of(chunk)
    assert texts is not None, f"no texts are made of {chunk.type}"
    return np.asarray(pd.to_numeric(pd.Series(texts.to_numpy(zero_copy_only=False)), errors="coerce"), np.float64)


def _joined(parts: Iterable[np.ndarray]) -> Float64[np.ndarray, " row"]:
    return np.concatenate([np.empty(0, np.float64), *parts])


def _without_blanks(texts: pa.Array) -> pa.Array:
    """The texts with null for empty ones and for those of white space alone."""
    is_blank = pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
    if not pc.any(is_blank).as_py():
        return texts
    return pc.if_else(is_blank, pa.scalar(None, pa.large_string()), texts)


def _texts_of(column: pa.Array) -> pa.Array | None:
    """The cells as text; None for a type of which pandas and Arrow write different texts, or none."""
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        values = _texts_of(column.dictionary)
        return None if values is None else values.take(column.indices)
    if types.is_boolean(kind):
        return pc.if_else(column, pa.scalar("True", pa.large_string()), pa.scalar("False", pa.large_string()))
    if types.is_floating(kind):
        return _texts_of_floats(column)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    is_number = types.is_integer(kind) or types.is_decimal(kind)
    if is_text or is_bytes or is_number or types.is_date(kind) or types.is_null(kind):
        return column.cast(pa.large_string())
    return None


def _texts_of_floats(column: pa.Array) -> pa.Array:
    """Floats as Python writes them; NaN is null. By their bits, for -0.0 equals 0.0."""
    values = column.to_numpy(zero_copy_only=False)
    codes, bits = pd.factorize(values.view(f"i{values.dtype.itemsize}"))
    names = [None if np.isnan(value) else str(value) for value in bits.view(values.dtype)]
    return pa.array(names, pa.large_string()).take(pa.array(codes))


def _are_whole_floats(texts: pa.Array) -> Bool[np.ndarray, " row"]:
    """Where a text is a whole number exactly as Python or NumPy writes it as a float."""
    return _in_parts(_are_whole, texts)


def _are_whole(texts: pa.Array) -> Bool[np.ndarray, " row"]:
    may_be = _filled(pc.ends_with(texts, pattern=".0")) | _filled(pc.match_substring(texts, pattern="e+"))
    if not may_be.any():
        return may_be
    found = _filled(pc.match_substring_regex(texts, pattern=_SHORT_WHOLE_FLOAT))
    # Only long and scientific ones are left to be looked at one by one.
    rest = np.flatnonzero(may_be & ~found)
    found[rest] = [_is_whole_float(text) for text in texts.take(pa.array(rest)).to_pylist()]
    return found


def _is_whole_float(text: str) -> bool:
    if len(text) > 32 or _WHOLE_FLOAT.fullmatch(text) is None:
        return False
    value = float(text)
    if abs(value) > float(np.finfo(np.float32).max):
        return text == repr(value)
    return value.is_integer() and text in (repr(value), str(np.float32(value)))


def _without_points(whole: pa.Array) -> pa.Array:
    """`without_point` of texts that all are whole floats."""
    shorter = pc.replace_substring_regex(whole, pattern=r"\.0$", replacement="")
    is_scientific = pc.match_substring(whole, pattern="e+")
    if not pc.any(is_scientific).as_py():
        return shorter
    numbers = [without_point(text) for text in whole.filter(is_scientific).to_pylist()]
    return pc.replace_with_mask(shorter, is_scientific, pa.array(numbers, pa.large_string()))


def _first_place(text: str, columns: Mapping[str, pa.Array]) -> str:
    for source, column in columns.items():
        row = pc.index(_distinct(column), text).as_py()
        if row >= 0:
            row = pc.index(column.indices, row).as_py() if _has_codes(column) else row
            return f"row {row + 1}" + (f" of {source}" if source else "")
    raise AssertionError(f"{text!r} is in no column")


def _has_codes(column: pa.Array) -> bool:
    return pa.types.is_dictionary(column.type)


def _distinct(column: pa.Array) -> pa.Array:
    """The names of a column with codes; the texts of any other, as often as they are there."""
    return column.dictionary if _has_codes(column) else column


def _chunks_of(column: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    """At least one, so that the type of an empty column is looked at too."""
    if isinstance(column, pa.Array):
        return [column]
    return column.chunks or [pa.array([], column.type)]


def _in_parts(find: Callable[[pa.Array], np.ndarray], texts: pa.Array) -> Bool[np.ndarray, " row"]:
    """What `find` says of the texts, a part of them after the other: what it needs meanwhile is that of a part."""
    found = np.zeros(len(texts), bool)
    for place, part in enumerate(parts_of(texts, _ROWS)):
        found[place * _ROWS : place * _ROWS + len(part)] = find(part)
    return found


def _filled(mask: pa.Array) -> Bool[np.ndarray, " row"]:
    return mask.fill_null(False).to_numpy(zero_copy_only=False)
