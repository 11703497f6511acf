"""What can be wrong with a catalogue's table, found in one pass and reported together.

Rows are numbered from 1, the first after the header; every problem names the value, some of its rows and the
fix.
"""

import difflib
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from distributed_rerank.data.texts import as_column
from distributed_rerank.errors import BadInput

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

logger = logging.getLogger(__name__)

SPLITS = ("train", "calibration", "validation")
"""calibration: labels that the extractor has not seen; `train` uses them where it knows those of split train."""
BOX = ("x_1", "y_1", "x_2", "y_2")
_OTHER_BOXES = (
    *("x1 y1 x2 y2", "xmin ymin xmax ymax", "left top right bottom", "x y w h", "x y width height", "bbox", "box"),
    *("left top width height", "bboxx bboxy bboxw bboxh", "bboxx bboxy bboxwidth bboxheight"),
)
"""Names of columns with boxes elsewhere, in small letters and without underscores."""
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
        """Columns that are needed and not there, or cannot be read: nothing more is said of them."""
        self._lines: list[str] = []
        self._words: dict[str, tuple[list[str], str]] = {}

    def add(self, text: str, bad: np.ndarray | None = None) -> None:
        """Note a problem; with a mask `bad` [row] only if it is true somewhere, with the rows' numbers."""
        if bad is None:
            self._lines.append(text)
        elif bad.any():
            self._lines.append(f"{text} ({_rows(bad)})")

    def note_no_value(self, column: str, texts: pa.Array, is_word: np.ndarray) -> None:
        """Note that the texts [row] of a column are words for no value where `is_word`; such cells count as empty."""
        self._words[column] = (texts.filter(pa.array(is_word)).unique().to_pylist(), _rows(is_word))

    def words_for_no_value(self, column: str) -> str:
        """What a message about an empty cell of the column adds: the words found there; "" for none."""
        if column not in self._words:
            return ""
        words, _ = self._words[column]
        return f" ({some(words)} {'stands' if len(words) == 1 else 'stand'} for no value)"

    def log_words_for_no_value(self) -> None:
        """Warn of the words that were taken for empty cells in columns of names."""
        for column in ("label", "category", "sequence", "item"):
            if column in self._words:
                words, rows = self._words[column]
                logger.warning("%s: %s in column %s counts as empty (%s)", self.source, some(words), column, rows)

    def raise_if_any(self) -> None:
        """One problem: one line. Several: a heading and one line each."""
        if len(self._lines) == 1:
            raise BadInput(f"{self.source}: {self._lines[0]}")
        if self._lines:
            lines = "".join(f"\n- {line}" for line in self._lines)
            raise BadInput(f"{self.source} has {len(self._lines)} problems:{lines}")


def check_ids(table: pd.DataFrame, problems: Problems) -> None:
    """Every id once: the first repeated ones are named with their rows."""
    ids = as_column(table["id"])
    if pc.all(pc.greater(ids[1:], ids[:-1])).as_py():
        return  # they ascend, as most tables do: nothing need be hashed
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
        words = problems.words_for_no_value("label")
        problems.add(f"no label in {split} rows{words}; give one or remove the rows", unlabelled)


def check_things(table: pd.DataFrame, problems: Problems) -> None:
    """All photos of one `item` have one label."""
    if "item" not in table or "label" in problems.absent:
        return
    pairs = set(zip(*(as_column(table[name]).to_pylist() for name in ("item", "label")), strict=True))
    n_labels = Counter(item for item, label in pairs if item is not None and label is not None)
    mixed = sorted(item for item, number in n_labels.items() if number > 1)
    if mixed:
        problems.add(f"items with photos of different labels: {some(mixed)}; an item is one thing: mend label or item")


def check_shared_labels(table: pd.DataFrame, is_allowed: bool, problems: Problems) -> None:
    """No label in two splits, unless that `is_allowed`: then a warning tells how many."""
    if problems.absent & {"split", "label"} or not set(table["split"].unique()) <= set(SPLITS):
        return  # what is wrong with the splits is told, and they may mean something else
    column, of_split = as_column(table["label"]), as_column(table["split"])
    labels = {split: column.filter(pc.equal(of_split, split)).unique().drop_null() for split in SPLITS}
    for split, other in itertools.combinations(SPLITS, 2):
        shared = sorted(labels[split].filter(pc.is_in(labels[split], value_set=labels[other])).to_pylist())
        if shared:
            found = f"{len(shared)} of {len(labels[other])} {other} labels are {split} labels too: {some(shared)}"
            tell_shared(found, is_allowed, problems)


def tell_shared(found: str, is_allowed: bool, problems: Problems) -> None:
    """Warn of labels in two splits where that `is_allowed`, else note a problem."""
    if is_allowed:
        logger.warning("%s: %s; figures of these labels say little about new ones", problems.source, found)
    else:
        problems.add(
            f"{found}; figures of labels that training has seen are too good: give each label to one split, or allow "
            "it with --allow-shared-labels"
        )


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
    """A train split with a label in every row; labels of one image are counted in the log."""
    if problems.absent & {"split", "label"}:
        return
    rows = (table["split"] == "train").to_numpy(dtype=bool)
    if not rows.any():
        problems.add("no row has split 'train'; training needs labelled images there")
        return
    check_labels(table, "train", problems)
    counts = table.loc[rows, "label"].dropna().value_counts(sort=False)
    n_single = int((counts == 1).sum())
    if n_single:
        logger.info("%s: %d of %d train labels have one image; they serve as negatives only", problems.source,
                    n_single, len(counts))  # fmt: skip


def check_columns(columns: pa.Table, names: Sequence[str], purpose: str, problems: Problems) -> None:
    """The columns that `purpose` needs, with a suggestion from `names` for one that is absent, and at least one row."""
    absent = [name for name in _REQUIRED[purpose] if name not in names]
    others = ", ".join(repr(name) for name in names if name not in _REQUIRED[purpose])
    if any(name in names for name in BOX):
        absent += [name for name in BOX if name not in names]
    problems.absent.update(absent)
    for name in absent:
        lower = {other.lower(): other for other in names}
        close = difflib.get_close_matches(name, lower, n=1, cutoff=0.7)
        hint = f"did you mean {lower[close[0]]!r}? Rename it" if close else "add it"
        hint += f", or rename the one of {others} that it is" if others and not close else ""
        problems.add(f"no column {name!r}, needed for {purpose}; {hint}")
    if "path" in names and len(columns) == 0:
        problems.add("the table has no rows")


def tell_unread_columns(names: Sequence[str], known: Sequence[str], source: str) -> None:
    """Warn of columns that are not read, but look as if they should be: `known` ones in another spelling, and boxes."""
    for name in names:
        meant = name.strip("\ufeff \u00a0\t").lower()
        if meant in known and meant not in names:
            logger.warning("%s: COLUMN %r IS NOT READ; call it %r where that is meant", source, name, meant)
    plain = {name.lower().replace("_", ""): name for name in names}
    boxes = next((words.split() for words in _OTHER_BOXES if all(word in plain for word in words.split())), [])
    if boxes and BOX[0] not in names:
        logger.warning(
            "%s: BOXES ARE NOT READ FROM %s, whole pictures are: to cut them, name the corners in pixels x_1, y_1 "
            "(left, top), x_2, y_2 (right, bottom: left + width, top + height)",
            source, ", ".join(plain[word] for word in boxes),
        )  # fmt: skip


def some(values: Sequence[Any], limit: int = 5) -> str:
    """The first few values for a message, and how many more there are."""
    shown = ", ".join(repr(value) for value in values[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def _rows(bad: np.ndarray) -> str:
    numbers = (np.flatnonzero(bad) + 1).tolist()
    return f"row {numbers[0]}" if len(numbers) == 1 else f"rows {some(numbers)}"
