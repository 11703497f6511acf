"""The columns of a catalogue's table as the program uses them: names as text, flags, boxes, full paths.

One column is made after the other, and what it was made from goes: beside the finished columns no more is held than
the cells that are still to be looked at.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool

from distributed_rerank.data.catalogue_boxes import boxes_of, side_of
from distributed_rerank.data.catalogue_checks import BOX, SPLITS, Problems, check_columns, some, tell_unread_columns
from distributed_rerank.data.stored_table import CODED, KNOWN, StoredTable
from distributed_rerank.data.text_codes import constant_codes, filled_codes, ordered_codes, rows_with, without_names
from distributed_rerank.data.text_columns import are_words_for_no_value, as_names, float_bits
from distributed_rerank.data.texts import parts_of
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.storage import paths

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

Columns = dict[str, Any]
"""By name: large_string, codes with their names in order, or NumPy's bool and float64."""
_NAMES = ("id", "label", "category", "sequence", "item")
_OPTIONAL = ("category", "sequence", "item")
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def normalise(stored: StoredTable, purpose: str, problems: Problems) -> Columns:
    """The columns of `Catalogue` except `path`, unsorted; what cannot be read is noted and left empty.

    `stored` is used up.
    """
    check_columns(stored.n_rows, stored.names, purpose, problems)
    tell_unread_columns(stored.names, KNOWN, problems.source)
    asked = [name for name in KNOWN if name not in BOX and (name in stored.names or name not in _OPTIONAL)]
    texts = {name: _texts(stored, name, problems) for name in asked}
    sides = {name: side_of(stored.columns.pop(name), name, problems) for name in BOX if name in stored.columns}
    if "path" in stored.names and "path" not in problems.absent:
        is_empty = texts["path"].is_null().to_numpy(zero_copy_only=False)
        problems.add("empty path; give every row a file or remove the row", is_empty)
    written = _filled(texts.pop("path"))
    boxes = boxes_of(sides, problems) if len(sides) == len(BOX) else {}
    is_given = "id" in stored.names and "id" not in problems.absent
    columns: Columns = {"id": _ids(texts.pop("id"), written, boxes, is_given, problems), "written_path": written}
    columns["label"] = ordered_codes(texts.pop("label"), by_value=True)
    columns["split"] = ordered_codes(_splits(stored.names, texts.pop("split"), purpose, problems))
    is_training = rows_with(columns["split"], _are_in(columns["split"].dictionary, SPLITS[:-1]))
    for name in ("is_query", "is_gallery"):
        columns[name] = _flags(name, texts.pop(name), problems) & ~is_training
    for name in _OPTIONAL:
        if name in texts:
            columns[name] = ordered_codes(texts.pop(name))
    give_back_memory()
    return columns | boxes


def full_paths(folder: str, written: pa.Array) -> pa.Array:
    """`paths.join` of all paths with the folder; `written` itself where that is what they are."""
    text = pa.large_string()
    is_other = pc.or_(pc.starts_with(written, "/"), pc.match_substring(written, "://"))
    if not pc.any(is_other).as_py():
        return pc.binary_join_element_wise(pa.scalar(folder, text), written, pa.scalar("/", text))
    # Some are absolute or URIs.
    joined = [pa.array([paths.join(folder, path) for path in part.to_pylist()], text) for part in parts_of(written)]
    is_kept = all(part.equals(own) for part, own in zip(joined, parts_of(written), strict=True))
    return written if is_kept else pa.concat_arrays(joined)


def _texts(stored: StoredTable, name: str, problems: Problems) -> Any:
    """The texts of a column, null where it has none or a word for no value; all null where it is absent.

    Columns of `CODED` are codes, see `text_codes`.
    """
    column = stored.columns.pop(name, None)
    try:
        if column is not None:
            texts = _without_words(column.texts(name), name, problems)
            give_back_memory()  # the cells have gone
            return as_names(texts, name, float_bits(column.kind)) if name in _NAMES else texts
    except BadInput as error:
        problems.add(str(error))
        problems.absent.add(name)
    return constant_codes(None, stored.n_rows) if name in CODED else pa.nulls(stored.n_rows, pa.large_string())


def _without_words(texts: Any, name: str, problems: Problems) -> Any:
    """Null in place of words for no value, which are noted."""
    is_coded = name in CODED
    distinct = texts.dictionary if is_coded else texts
    is_word = are_words_for_no_value(distinct)
    if not is_word.any():
        return texts
    problems.note_no_value(name, distinct.filter(pa.array(is_word)), rows_with(texts, is_word) if is_coded else is_word)
    if is_coded:
        return without_names(texts, is_word)
    return pc.if_else(pa.array(is_word), pa.scalar(None, pa.large_string()), texts)


def _ids(
    given: pa.Array, paths: pa.Array, boxes: Mapping[str, np.ndarray], is_given: bool, problems: Problems
) -> pa.Array:
    if is_given:
        words = problems.words_for_no_value("id")
        is_empty = given.is_null().to_numpy(zero_copy_only=False)
        problems.add(f"empty id{words}; fill it or remove the id column", is_empty)
        return _filled(given)
    if not boxes:
        return paths
    parts, start = [paths[:0]], 0
    for part in parts_of(paths):
        parts.append(_ids_of_boxes(part, [corners[start : start + len(part)] for corners in boxes.values()]))
        start += len(part)
    return pa.concat_arrays(parts)


def _ids_of_boxes(paths: pa.Array, boxes: Sequence[np.ndarray]) -> pa.Array:
    """path#left,top,right,bottom, where there is a box."""
    has_box = ~np.isnan(boxes[0])
    corners = [pa.array(np.where(has_box, side, 0).astype(np.int64)).cast(pa.large_string()) for side in boxes]
    joined = pc.binary_join_element_wise(*corners, pa.scalar(",", pa.large_string()))
    named = pc.binary_join_element_wise(paths, joined, pa.scalar("#", pa.large_string()))
    return pc.if_else(pa.array(has_box), named, paths)


def _splits(names: Sequence[str], texts: pa.DictionaryArray, purpose: str, problems: Problems) -> pa.DictionaryArray:
    values = filled_codes(texts, "")
    if "split" in names:
        found = set(values.dictionary.to_pylist())
        unknown = sorted(found - set(SPLITS) - ({""} if purpose == "images" else set()))
        bad = rows_with(values, _are_in(values.dictionary, unknown))
        problems.add(f"unknown split {some(unknown)}; use 'train', 'calibration' or 'validation'", bad)
    return values


def _flags(name: str, texts: pa.DictionaryArray, problems: Problems) -> Bool[np.ndarray, " row"]:
    written = texts.dictionary.to_pylist()
    meaning = [_FLAGS.get(text.strip().lower()) for text in written]
    unknown = sorted(text for text, value in zip(written, meaning, strict=True) if value is None)
    bad = rows_with(texts, np.array([value is None for value in meaning], bool))
    problems.add(f"{name} is {some(unknown)}; use True/False, 1/0 or leave it empty", bad)
    return rows_with(texts, np.array([value is True for value in meaning], bool))


def _are_in(names: pa.Array, asked: Sequence[str]) -> Bool[np.ndarray, " name"]:
    return np.array([name in asked for name in names.to_pylist()], bool)


def _filled(texts: pa.Array) -> pa.Array:
    return texts.fill_null("") if texts.null_count else texts
