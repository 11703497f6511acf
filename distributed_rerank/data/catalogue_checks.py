"""What can be wrong with a catalogue's table, found in one pass and reported together.

Rows are numbered from 1, the first after the header; every problem names the value, some of its rows and the
fix.
"""

import difflib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from distributed_rerank.data.text_codes import codes_of, rows_with
from distributed_rerank.data.texts import parts_of
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

    def note_no_value(self, column: str, words: pa.Array, is_word: np.ndarray) -> None:
        """Note these words for no value in a column, in the rows where `is_word` [row]; such cells count as empty."""
        self._words[column] = (words.unique().to_pylist(), _rows(is_word))

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


def check_ids(ids: pa.Array, order: pa.Array | None, problems: Problems) -> None:
    """Every id once: the first repeated ones are named with their rows.

    `order` are the rows in the order of their ids, equal ones in that of the table; None: that of the table.
    """
    is_again = np.zeros(len(ids) + 1, bool)
    before: pa.Array = ids[:0]
    start = 0
    for part in parts_of(ids if order is None else order):
        names = pa.concat_arrays([before, part if order is None else ids.take(part)])
        is_same = pc.and_(pc.equal(names[1:], names[:-1]), pc.not_equal(names[1:], ""))
        is_again[start + len(part) - len(is_same) : start + len(part)] = is_same.to_numpy(zero_copy_only=False)
        before, start = names[-1:], start + len(part)
    # [repeated id]: where its rows begin in the order, and where they end.
    begins = np.flatnonzero(is_again[1:] & ~is_again[:-1])
    ends = np.flatnonzero(~is_again[1:] & is_again[:-1]) + 1
    rows = [np.arange(a, b) if order is None else order[a:b].to_numpy() for a, b in zip(begins, ends, strict=True)]
    rows.sort(key=lambda group: group[0])
    named = [f"{ids[int(group[0])].as_py()!r} in rows {some((group + 1).tolist())}" for group in rows[:3]]
    if named:
        rest = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        problems.add(f"duplicate ids: {'; '.join(named)}{rest}; remove the repeats or give an id column")


def check_labels(columns: Mapping[str, Any], split: str, problems: Problems) -> None:
    """A label in every row of the split."""
    if "label" not in problems.absent:
        unlabelled = _rows_of(columns, split) & (codes_of(columns["label"]) < 0)
        words = problems.words_for_no_value("label")
        problems.add(f"no label in {split} rows{words}; give one or remove the rows", unlabelled)


def check_things(columns: Mapping[str, Any], problems: Problems) -> None:
    """All photos of one `item` have one label."""
    if "item" not in columns or "label" in problems.absent:
        return
    item, label = codes_of(columns["item"]), codes_of(columns["label"])
    is_known = (item >= 0) & (label >= 0)
    # [item]: the least and the greatest of its labels' numbers.
    least = np.full(len(columns["item"].dictionary), np.iinfo(np.int32).max, np.int32)
    greatest = np.full(len(least), -1, np.int32)
    np.minimum.at(least, item[is_known], label[is_known])
    np.maximum.at(greatest, item[is_known], label[is_known])
    mixed = sorted(columns["item"].dictionary.filter(pa.array(least < greatest)).to_pylist())
    if mixed:
        problems.add(f"items with photos of different labels: {some(mixed)}; an item is one thing: mend label or item")


def check_shared_labels(columns: Mapping[str, Any], is_allowed: bool, problems: Problems) -> None:
    """No label in two splits, unless that `is_allowed`: then a warning tells how many."""
    if problems.absent & {"split", "label"} or not set(columns["split"].dictionary.to_pylist()) <= set(SPLITS):
        return  # what is wrong with the splits is told, and they may mean something else
    names, codes = columns["label"].dictionary, codes_of(columns["label"])
    # [label] of each split: whether one of its rows has it.
    has_label = {split: np.zeros(len(names) + 1, bool) for split in SPLITS}
    for split in SPLITS:
        has_label[split][codes[_rows_of(columns, split)]] = True
        has_label[split][-1] = False  # the last is that of rows without a label
    for split, other in itertools.combinations(SPLITS, 2):
        shared = sorted(names.filter(pa.array((has_label[split] & has_label[other])[:-1])).to_pylist())
        if shared:
            n_labels = int(has_label[other].sum())
            found = f"{len(shared)} of {n_labels} {other} labels are {split} labels too: {some(shared)}"
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


def check_evaluation(columns: Mapping[str, Any], problems: Problems) -> None:
    """A validation split with labels, at least one query and one gallery item, and no row that is neither."""
    if problems.absent & {"split", "is_query", "is_gallery"}:
        return
    rows = _rows_of(columns, "validation")
    if not rows.any():
        problems.add("no row has split 'validation'; evaluation needs queries and a gallery there")
        return
    is_query, is_gallery = columns["is_query"], columns["is_gallery"]
    check_labels(columns, "validation", problems)
    if not is_query.any():
        problems.add("no query: set is_query to True in at least one validation row")
    if not is_gallery.any():
        problems.add("no gallery: set is_gallery to True in at least one validation row")
    neither = rows & ~is_query & ~is_gallery
    if is_query.any() and is_gallery.any():
        problems.add("validation rows that are neither query nor gallery; set is_query or is_gallery to True", neither)


def check_training(columns: Mapping[str, Any], problems: Problems) -> None:
    """A train split with a label in every row; labels of one image are counted in the log."""
    if problems.absent & {"split", "label"}:
        return
    rows = _rows_of(columns, "train")
    if not rows.any():
        problems.add("no row has split 'train'; training needs labelled images there")
        return
    check_labels(columns, "train", problems)
    codes = codes_of(columns["label"])
    counts = np.bincount(codes[rows & (codes >= 0)])
    n_single = int((counts == 1).sum())
    if n_single:
        logger.info("%s: %d of %d train labels have one image; they serve as negatives only", problems.source,
                    n_single, int((counts > 0).sum()))  # fmt: skip


def check_columns(n_rows: int, names: Sequence[str], purpose: str, problems: Problems) -> None:
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
    if "path" in names and n_rows == 0:
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


def _rows_of(columns: Mapping[str, Any], split: str) -> np.ndarray:
    names = columns["split"].dictionary.to_pylist()
    return rows_with(columns["split"], np.array([name == split for name in names], bool))


def _rows(bad: np.ndarray) -> str:
    numbers = (np.flatnonzero(bad) + 1).tolist()
    return f"row {numbers[0]}" if len(numbers) == 1 else f"rows {some(numbers)}"
