"""What can be wrong with a catalogue's table, found in one pass and reported together (layer 2).

Rows are numbered from 1, the first after the header; every problem names the value, some of its rows and the
fix.
"""

import difflib
import io
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from distributed_rerank.data import locations
from distributed_rerank.errors import BadInput

SPLITS = ("train", "validation")
_BOX = ("x_1", "y_1", "x_2", "y_2")
_INTEGER = re.compile(r"-?\d+(\.0*)?")
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_REQUIRED = {
    "images": ("path",),
    "evaluation": ("path", "label", "split", "is_query", "is_gallery"),
    "training": ("path", "label", "split"),
}


class Problems:
    """Collects what is wrong with one table and raises it as one BadInput."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.absent: set[str] = set()
        self._lines: list[str] = []

    def add(self, text: str, bad: np.ndarray | None = None) -> None:
        """Note a problem; with a mask `bad` [row] only if it is true somewhere, with the rows' numbers."""
        if bad is None:
            self._lines.append(text)
        elif bad.any():
            self._lines.append(f"{text} ({_rows(bad)})")

    def raise_if_any(self) -> None:
        """One problem: one line. Several: a heading and one line each."""
        if len(self._lines) == 1:
            raise BadInput(f"{self.source}: {self._lines[0]}")
        if self._lines:
            lines = "".join(f"\n- {line}" for line in self._lines)
            raise BadInput(f"{self.source} has {len(self._lines)} problems:{lines}")


def load_table(uri: str, schemes: frozenset[str]) -> pd.DataFrame:
    """The raw table, CSV (all cells as text) or Parquet (told apart by the first bytes). Raises BadInput."""
    try:
        content = locations.read_bytes(uri, schemes)
    except OSError as error:
        raise BadInput(f"cannot read the catalogue {uri}: {error.strerror or error}; check the path") from error
    try:
        if content[:4] == b"PAR1":
            table = pq.read_table(io.BytesIO(content))
            return table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
        return pd.read_csv(
            io.BytesIO(content),
            dtype=str,
            keep_default_na=False,
            na_values=["", "nan", "NaN"],
            encoding="utf-8-sig",
            index_col=False,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadInput(f"{uri} is neither a readable CSV nor a Parquet table: {reason}") from error


def normalise(raw: pd.DataFrame, folder: str, purpose: str, problems: Problems) -> pd.DataFrame:
    """The table with the columns of `Catalogue` (unsorted); what cannot be read is noted and left empty."""
    _check_columns(raw, purpose, problems)
    known = {"id", "path", "label", "split", "is_query", "is_gallery", "category", "sequence", *_BOX}
    text = {
        name: texts(pd.Series(raw[name])) if name in raw else np.full(len(raw), None, dtype=object)
        for name in sorted(known)
    }
    table = pd.DataFrame(index=pd.RangeIndex(len(raw)))
    is_empty = text["path"] == None  # noqa: E711  element-wise
    if "path" in raw:
        problems.add("empty path; give every row a file or remove the row", is_empty)
    written = np.where(is_empty, "", text["path"])
    boxes = _boxes(raw, text, problems)
    table["id"] = pd.Series(_ids(text["id"], written, boxes, "id" in raw, problems), dtype=object)
    table["path"] = pd.Series([locations.join(folder, path) for path in written], dtype=object)
    table["written_path"] = pd.Series(written, dtype=object)
    table["label"] = pd.Series(_without_points(text["label"]), dtype=object)
    table["split"] = pd.Series(_splits(raw, text["split"], purpose, problems), dtype=object)
    for name in ("is_query", "is_gallery"):
        table[name] = _flags(name, text[name], problems) & (table["split"] != "train").to_numpy(dtype=bool)
    for name in ("category", "sequence"):
        if name in raw:
            table[name] = pd.Series(_without_points(text[name]), dtype=object)
    if boxes is not None:
        for position, name in enumerate(_BOX):
            table[name] = boxes[:, position]
    reserved = known | {"written_path"}
    extra = [name for name in raw.columns if name not in reserved]
    return pd.concat([table, raw[extra].reset_index(drop=True)], axis=1)


def check_ids(table: pd.DataFrame, problems: Problems) -> None:
    """Every id once: the first repeated ones are named with their rows."""
    is_repeated = table["id"].duplicated(keep=False).to_numpy(dtype=bool) & (table["id"] != "").to_numpy(dtype=bool)
    groups: dict[str, list[int]] = {}
    for row in np.flatnonzero(is_repeated).tolist():
        groups.setdefault(table["id"].iat[row], []).append(row + 1)
    named = [f"{name!r} in rows {some(rows)}" for name, rows in list(groups.items())[:3]]
    if named:
        rest = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
        problems.add(f"duplicate ids: {'; '.join(named)}{rest}; remove the repeats or give an id column")


def check_labels(table: pd.DataFrame, split: str, problems: Problems) -> None:
    """A label in every row of the split."""
    if "label" not in problems.absent:
        unlabelled = (table["split"] == split).to_numpy(dtype=bool) & table["label"].isna().to_numpy(dtype=bool)
        problems.add(f"no label in {split} rows; give one or remove the rows", unlabelled)


def check_evaluation(table: pd.DataFrame, problems: Problems) -> None:
    """A validation split with labels, at least one query and one gallery item, and no row that is neither."""
    if problems.absent & {"split", "is_query", "is_gallery"}:
        return
    rows = (table["split"] == "validation").to_numpy(dtype=bool)
    if not rows.any():
        problems.add("no row has split 'validation'; evaluation needs queries and a gallery there")
        return
    is_query, is_gallery = table["is_query"].to_numpy(dtype=bool), table["is_gallery"].to_numpy(dtype=bool)
    check_labels(table, "validation", problems)
    if not is_query.any():
        problems.add("no query: set is_query to True in at least one validation row")
    if not is_gallery.any():
        problems.add("no gallery: set is_gallery to True in at least one validation row")
    neither = rows & ~is_query & ~is_gallery
    if is_query.any() and is_gallery.any():
        problems.add("validation rows that are neither query nor gallery; set is_query or is_gallery to True", neither)


def check_training(table: pd.DataFrame, problems: Problems) -> None:
    """A train split with labels, and at least two images of every label."""
    if problems.absent & {"split", "label"}:
        return
    rows = (table["split"] == "train").to_numpy(dtype=bool)
    if not rows.any():
        problems.add("no row has split 'train'; training needs labelled images there")
        return
    check_labels(table, "train", problems)
    counts = table.loc[rows, "label"].dropna().value_counts(sort=False)
    single = sorted(counts.index[counts == 1].tolist())
    if single:
        bad = rows & table["label"].isin(single).to_numpy(dtype=bool)
        problems.add(
            f"labels with one training image where two are needed: {some(single)}; add images or remove them",
            bad,
        )


def some(values: Sequence[Any], limit: int = 5) -> str:
    """The first few values for a message, and how many more there are."""
    shown = ", ".join(repr(value) for value in values[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def are_integers(names: Iterable[str]) -> bool:
    """True where every text is a whole number of a size that int64 holds."""
    return all(len(name) <= 18 and _INTEGER.fullmatch(name) for name in names)


def texts(column: pd.Series) -> np.ndarray:
    """A column as an object array of str: whole numbers without a point, missing and empty cells as None.

    Equal cells of a text column share one object, for most columns have few values.
    """
    if isinstance(column.dtype, pd.StringDtype):
        codes, names = pd.factorize(column)
        return _objects([_text(name) for name in names] + [None])[codes]
    values = column.astype(object).to_numpy(dtype=object, copy=True)
    values[column.isna().to_numpy(dtype=bool)] = None
    return _objects([_text(value) for value in values.tolist()])


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value if value and not value.isspace() else None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _objects(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    result = np.empty(len(values), dtype=object)
    result[:] = values
    return result


def _rows(bad: np.ndarray) -> str:
    numbers_ = (np.flatnonzero(bad) + 1).tolist()
    return f"row {numbers_[0]}" if len(numbers_) == 1 else f"rows {some(numbers_)}"


def _check_columns(raw: pd.DataFrame, purpose: str, problems: Problems) -> None:
    names = [str(name) for name in raw.columns]
    absent = [name for name in _REQUIRED[purpose] if name not in names]
    boxes = [name for name in _BOX if name in names]
    if boxes:
        absent += [name for name in _BOX if name not in names]
    problems.absent.update(absent)
    for name in absent:
        lower = {other.lower(): other for other in names}
        close = difflib.get_close_matches(name, lower, n=1, cutoff=0.7)
        hint = f"did you mean {lower[close[0]]!r}? Rename it" if close else "add it"
        problems.add(f"no column {name!r}, needed for {purpose}; {hint}")
    if len(raw) == 0:
        problems.add("the table has no rows")


def _ids(
    given: np.ndarray, paths: np.ndarray, boxes: np.ndarray | None, is_given: bool, problems: Problems
) -> np.ndarray:
    if is_given:
        problems.add("empty id; fill it or remove the id column", given == None)  # noqa: E711  element-wise
        return _objects([value or "" for value in given])
    if boxes is None:
        return _objects(paths)
    return _objects(
        [
            path if np.isnan(box).any() else f"{path}#{','.join(str(int(value)) for value in box)}"
            for path, box in zip(paths, boxes, strict=True)
        ]
    )


def _without_points(values: np.ndarray) -> list[str | None]:
    """Where all are whole numbers, "7.0" (pandas writes a column with gaps so) becomes "7"."""
    names = {value for value in values if value is not None}
    if not are_integers(names):
        return list(values)
    short = {name: str(int(name.partition(".")[0])) for name in names}
    return [short.get(value) for value in values]


def _splits(raw: pd.DataFrame, values: np.ndarray, purpose: str, problems: Problems) -> np.ndarray:
    values = _objects([value or "" for value in values])
    if "split" in raw:
        unknown = sorted(set(values) - set(SPLITS) - ({""} if purpose == "images" else set()))
        bad = np.isin(values.astype(str), unknown)
        problems.add(f"unknown split {some(unknown)}; use 'train' or 'validation'", bad)
    return values


def _flags(name: str, values: np.ndarray, problems: Problems) -> np.ndarray:
    meaning = {value: _FLAGS.get(value.strip().lower()) for value in set(values) if value is not None}
    flags = pd.Series([meaning.get(value) for value in values], dtype=object)
    bad = flags.isna().to_numpy(dtype=bool) & (values != None)  # noqa: E711  element-wise
    problems.add(f"{name} is {some(sorted(set(values[bad])))}; use True/False, 1/0 or leave it empty", bad)
    return flags.eq(True).to_numpy(dtype=bool)


def _boxes(raw: pd.DataFrame, text: dict[str, np.ndarray], problems: Problems) -> np.ndarray | None:
    if any(name not in raw for name in _BOX):
        return None
    cells = np.stack([text[name] for name in _BOX], axis=1)
    is_empty = cells == None  # noqa: E711  element-wise
    corners = [pd.to_numeric(pd.Series(text[name], dtype=object), errors="coerce") for name in _BOX]
    boxes = np.stack([np.asarray(corner, dtype=np.float64) for corner in corners], axis=1)
    is_number = np.isfinite(boxes)
    problems.add(
        "box corner that is not a number; fill it or leave all four empty",
        (~is_number & ~is_empty).any(axis=1),
    )
    partial = is_empty.any(axis=1) & ~is_empty.all(axis=1)
    problems.add("box with NaN: some of x_1, y_1, x_2, y_2 are empty; fill them or leave all four empty", partial)
    boxes = np.trunc(np.where(is_number.all(axis=1, keepdims=True), boxes, np.nan))
    inverted = (boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])
    problems.add("inverted or empty box; x_1 < x_2 and y_1 < y_2 are needed (left, top, right, bottom)", inverted)
    return boxes
