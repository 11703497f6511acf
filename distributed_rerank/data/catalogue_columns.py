"""The columns of a catalogue's table as the program uses them: names as text, flags, boxes, full paths.

Only the columns that a catalogue knows are read; others, the index that pandas writes among them, are ignored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Float64

from distributed_rerank.data.catalogue_checks import BOX, SPLITS, Problems, check_columns, some, tell_unread_columns
from distributed_rerank.data.table_files import TableFile
from distributed_rerank.data.text_columns import (
    are_words_for_no_value,
    as_names,
    as_numbers,
    as_texts,
    float_bits,
)
from distributed_rerank.data.texts import as_series
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import paths

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

KNOWN = ("id", "path", "label", "split", "is_query", "is_gallery", "category", "sequence", "item", *BOX)
_NAMES = ("id", "label", "category", "sequence", "item")
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_ROWS_PER_BATCH = 1 << 20
_MOST_PIXELS = float(1 << 31)
"""Of a side of any picture."""


class RawTable(NamedTuple):
    """The known columns of a table as they are stored, and the names of all its columns."""

    columns: pa.Table
    names: Sequence[str]

    def with_constants(self, **values: str) -> "RawTable":
        """The same with these texts in all rows of these columns, whatever the table has there."""
        columns = self.columns.drop_columns([name for name in values if name in self.columns.column_names])
        for name, value in values.items():
            columns = columns.append_column(name, pa.repeat(pa.scalar(value), len(columns)))
        return RawTable(columns, [*self.names, *values])


def load_table(uri: str, schemes: frozenset[str]) -> RawTable:
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

    if file.is_parquet:
        return RawTable(file.parquet_table(choose), all_names)
    return RawTable(pa.concat_tables(file.csv_batches(choose, set(KNOWN), _ROWS_PER_BATCH)), all_names)


def normalise(raw: RawTable, folder: str, purpose: str, problems: Problems) -> pd.DataFrame:
    """The table with the columns of `Catalogue` (unsorted); what cannot be read is noted and left empty."""
    check_columns(raw.columns, raw.names, purpose, problems)
    tell_unread_columns(raw.names, KNOWN, problems.source)
    texts = {name: _texts(raw.columns, name, problems) for name in KNOWN}
    table = pd.DataFrame(index=pd.RangeIndex(len(raw.columns)))
    is_empty = _is_null(texts["path"])
    if "path" in raw.names and "path" not in problems.absent:
        problems.add("empty path; give every row a file or remove the row", is_empty)
    written = texts["path"].fill_null("")
    boxes = _boxes(raw.columns, texts, problems)
    is_given = "id" in raw.names and "id" not in problems.absent
    ids = _ids(texts["id"], written, boxes, is_given, problems)
    table["id"] = as_series(ids)
    table["path"] = as_series(_joined(folder, written))
    table["written_path"] = as_series(written)
    table["label"] = as_series(texts["label"])
    table["split"] = as_series(_splits(raw.names, texts["split"], purpose, problems))
    for name in ("is_query", "is_gallery"):
        table[name] = _flags(name, texts[name], problems) & ~table["split"].isin(SPLITS[:-1]).to_numpy(dtype=bool)
    for name in ("category", "sequence", "item"):
        if name in raw.names:
            table[name] = as_series(texts[name])
    if boxes is not None:
        for position, name in enumerate(BOX):
            table[name] = boxes[:, position]
    return table


def _texts(columns: pa.Table, name: str, problems: Problems) -> pa.Array:
    """The texts of a column, null where it has none or a word for no value; all null where it is absent."""
    missing = pa.nulls(len(columns), pa.large_string())
    if name not in columns.column_names:
        return missing
    try:
        texts = as_texts(columns[name], name)
        is_word = are_words_for_no_value(texts)
        if is_word.any():
            problems.note_no_value(name, texts, is_word)
            texts = pc.if_else(pa.array(is_word), pa.scalar(None, pa.large_string()), texts)
        return as_names(texts, name, float_bits(columns[name].type)) if name in _NAMES else texts
    except BadInput as error:
        problems.add(str(error))
        problems.absent.add(name)
        return missing


def _ids(
    given: pa.Array, paths: pa.Array, boxes: Float64[np.ndarray, "row 4"] | None, is_given: bool, problems: Problems
) -> pa.Array:
    if is_given:
        words = problems.words_for_no_value("id")
        problems.add(f"empty id{words}; fill it or remove the id column", _is_null(given))
        return given.fill_null("")
    if boxes is None:
        return paths
    # path#left,top,right,bottom, where there is a box
    has_box = ~np.isnan(boxes[:, 0])
    corners = [
        pa.array(np.where(has_box, boxes[:, side], 0).astype(np.int64)).cast(pa.large_string()) for side in range(4)
    ]
    comma = pa.scalar(",", pa.large_string())
    joined = pc.binary_join_element_wise(*corners, comma)
    named = pc.binary_join_element_wise(paths, joined, pa.scalar("#", pa.large_string()))
    return pc.if_else(pa.array(has_box), named, paths)


def _joined(folder: str, written: pa.Array) -> pa.Array:
    """`paths.join` of all paths."""
    text = pa.large_string()
    joined = pc.binary_join_element_wise(pa.scalar(folder, text), written, pa.scalar("/", text))
    # Absolute paths and URIs are few, or the folder does not matter.
    is_other = pc.or_(pc.starts_with(written, "/"), pc.match_substring(written, "://"))
    others = [paths.join(folder, path) for path in written.filter(is_other).to_pylist()]
    return pc.replace_with_mask(joined, is_other, pa.array(others, text)) if others else joined


def _splits(names: Sequence[str], texts: pa.Array, purpose: str, problems: Problems) -> pa.Array:
    values = texts.fill_null("")
    if "split" in names:
        unknown = sorted(set(values.unique().to_pylist()) - set(SPLITS) - ({""} if purpose == "images" else set()))
        bad = _filled(pc.is_in(values, value_set=pa.array(unknown, pa.large_string())))
        problems.add(f"unknown split {some(unknown)}; use 'train', 'calibration' or 'validation'", bad)
    return values


def _flags(name: str, texts: pa.Array, problems: Problems) -> Bool[np.ndarray, " row"]:
    distinct = texts.dictionary_encode()
    written = distinct.dictionary.to_pylist()
    meaning = [_FLAGS.get(text.strip().lower()) for text in written]
    codes = distinct.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    # One more entry at the end, for the rows without a text.
    is_unknown = np.array([value is None for value in meaning] + [False])
    unknown = sorted(text for text, value in zip(written, meaning, strict=True) if value is None)
    problems.add(f"{name} is {some(unknown)}; use True/False, 1/0 or leave it empty", is_unknown[codes])
    return np.array([value is True for value in meaning] + [False])[codes]


def _boxes(columns: pa.Table, texts: dict[str, pa.Array], problems: Problems) -> Float64[np.ndarray, "row 4"] | None:
    """Corners (left, top, right, bottom) in whole pixels, fractions cut off as in OML; NaN where there is no box."""
    if any(name not in columns.column_names for name in BOX):
        return None
    is_empty = np.stack([_is_null(texts[name]) for name in BOX], axis=1)
    boxes = np.stack([as_numbers(columns[name]) for name in BOX], axis=1)
    is_number = np.abs(boxes) < _MOST_PIXELS
    is_wrong = ~is_number & ~is_empty
    if is_wrong.any():
        row, side = np.argwhere(is_wrong)[0]
        text = texts[BOX[side]][int(row)].as_py()
        hint = "; write a decimal point" if "," in text else ""
        problems.add(f"box corner {text!r} is not a number{hint}; fill it or leave all four empty", _in_any(is_wrong))
    partial = _in_any(is_empty) & ~_in_all(is_empty)
    problems.add("box with NaN: some of x_1, y_1, x_2, y_2 are empty; fill them or leave all four empty", partial)
    boxes = np.where(_in_all(is_number)[:, None], boxes, np.nan)
    # Shares of width and height, also some that a detector put a little outside: as pixels at most one is left of them.
    is_right_way = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    are_shares = _in_all((boxes > -1) & (boxes < 2)) & is_right_way
    problems.add(
        "box corners between 0 and 1 look like shares of the image; pixels are needed: multiply x_1 and x_2 by its "
        "width, y_1 and y_2 by its height",
        are_shares,
    )
    boxes = np.trunc(boxes)
    is_inverted = (boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])
    problems.add(
        "inverted or empty box; x_1 < x_2 and y_1 < y_2 are needed (left, top, right, bottom; to a width add x_1, to a "
        "height y_1)",
        is_inverted & ~are_shares,
    )
    return boxes


def _in_any(cells: Bool[np.ndarray, "row side"]) -> np.ndarray:
    return np.asarray(cells.any(axis=1))


def _in_all(cells: Bool[np.ndarray, "row side"]) -> np.ndarray:
    return np.asarray(cells.all(axis=1))


def _filled(mask: pa.Array) -> Bool[np.ndarray, " row"]:
    return mask.to_numpy(zero_copy_only=False)


def _is_null(texts: pa.Array) -> Bool[np.ndarray, " row"]:
    return texts.is_null().to_numpy(zero_copy_only=False)
