"""The boxes of a catalogue's table: corners in whole pixels, and what can be wrong with them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64

from distributed_rerank.data.catalogue_checks import Problems
from distributed_rerank.data.stored_table import StoredColumn
from distributed_rerank.data.text_columns import are_words_for_no_value, as_numbers, as_texts
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.tensors import sharding

_ROWS = 1 << 16
"""Boxes that are looked at together."""
_MOST_PIXELS = float(1 << 31)
"""Of a side of any picture."""


class Side(NamedTuple):
    """One column of a table's boxes."""

    corners: Float64[np.ndarray, " row"]
    is_empty: Bool[np.ndarray, " row"]
    wrong: tuple[int, str] | None
    """The first row with something else than a number of pixels, counted from 0, and what stands there."""


def side_of(column: StoredColumn, name: str, problems: Problems) -> Side:
    """The numbers of a column; a type that holds none is noted, and then all rows are empty. `column` is used up."""
    cells = column.cells()
    try:
        is_empty = np.concatenate([np.zeros(0, bool), *(_are_empty(chunk, name) for chunk in cells.chunks)])
    except BadInput as error:
        problems.add(str(error))
        problems.absent.add(name)
        return Side(np.full(len(cells), np.nan), np.ones(len(cells), bool), None)
    corners = as_numbers(cells)
    give_back_memory()  # the texts have gone
    is_wrong = ~(np.abs(corners) < _MOST_PIXELS) & ~is_empty
    if not is_wrong.any():
        return Side(corners, is_empty, None)
    row = int(is_wrong.argmax())
    return Side(corners, is_empty, (row, as_texts(cells.slice(row, 1), name)[0].as_py()))


def boxes_of(sides: Mapping[str, Side], problems: Problems) -> dict[str, Float64[np.ndarray, " row"]]:
    """Corners left, top, right, bottom by the names of `sides`, whose memory they take.

    They are in whole pixels, fractions cut off as in OML; NaN where there is no box.
    """
    corners = {name: side.corners for name, side in sides.items()}
    n_rows = len(next(iter(corners.values())))
    is_wrong, is_partial, are_shares, is_inverted = np.zeros((4, n_rows), bool)
    for start, stop in sharding.blocks(n_rows, _ROWS):
        part = slice(start, stop)
        is_empty = np.stack([side.is_empty[part] for side in sides.values()], axis=1)
        boxes = np.stack([side.corners[part] for side in sides.values()], axis=1)
        is_number = np.abs(boxes) < _MOST_PIXELS
        is_wrong[part] = _in_any(~is_number & ~is_empty)
        is_partial[part] = _in_any(is_empty) & ~_in_all(is_empty)
        boxes = np.where(_in_all(is_number)[:, None], boxes, np.nan)
        # Shares of width and height, also some that a detector put a little outside: as pixels at most one is left.
        is_right_way = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
        are_shares[part] = _in_all((boxes > -1) & (boxes < 2)) & is_right_way
        boxes = np.trunc(boxes)
        is_inverted[part] = (boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])
        for place, name in enumerate(corners):
            corners[name][part] = boxes[:, place]
    _tell_wrong(sides, is_wrong, problems)
    problems.add("box with NaN: some of x_1, y_1, x_2, y_2 are empty; fill them or leave all four empty", is_partial)
    problems.add(
        "box corners between 0 and 1 look like shares of the image; pixels are needed: multiply x_1 and x_2 by its "
        "width, y_1 and y_2 by its height",
        are_shares,
    )
    problems.add(
        "inverted or empty box; x_1 < x_2 and y_1 < y_2 are needed (left, top, right, bottom; to a width add x_1, to a "
        "height y_1)",
        is_inverted & ~are_shares,
    )
    return corners


def _tell_wrong(sides: Mapping[str, Side], is_wrong: Bool[np.ndarray, " row"], problems: Problems) -> None:
    """Names the first cell that is no number: that of the first row, of its first side."""
    found = [side.wrong for side in sides.values() if side.wrong is not None]
    if found:
        _, text = min(found, key=lambda wrong: wrong[0])
        hint = "; write a decimal point" if "," in text else ""
        problems.add(f"box corner {text!r} is not a number{hint}; fill it or leave all four empty", is_wrong)


def _are_empty(cells: pa.Array, name: str) -> Bool[np.ndarray, " row"]:
    texts = as_texts(cells, name)
    return texts.is_null().to_numpy(zero_copy_only=False) | are_words_for_no_value(texts)


def _in_any(cells: Bool[np.ndarray, "row side"]) -> np.ndarray:
    return np.asarray(cells.any(axis=1))


def _in_all(cells: Bool[np.ndarray, "row side"]) -> np.ndarray:
    return np.asarray(cells.all(axis=1))
