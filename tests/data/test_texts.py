"""Columns of texts: places against a dictionary, JSON against json.dumps."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_rerank.data import texts
from distributed_rerank.data.texts import Texts, json_of_columns
from distributed_rerank.storage.files import json_digest, text_digest

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@given(st.sets(NAMES, max_size=40), st.lists(st.none() | NAMES, max_size=40), st.integers(1, 9))
def test_places_are_those_of_a_dictionary_for_any_size_of_shelf(
    column: set[str], wanted: list[str | None], shelf: int
) -> None:
    ordered = sorted(column)
    wanted = [*wanted, *ordered[::3]]
    place = {name: number for number, name in enumerate(ordered)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(texts, "_ROWS_OF_SHELF", shelf)
        found = Texts(pa.array(ordered, pa.string())).places_of(pa.array(wanted, pa.string()))
    assert found.tolist() == [place.get(name, -1) for name in wanted]  # pyright: ignore


def test_texts_are_taken_by_place_slice_and_mask() -> None:
    column = Texts(np.array(["a", "b", "ü"], dtype=object))
    assert (column[2], column[-1], len(column), list(column)) == ("ü", "ü", 3, ["a", "b", "ü"])
    assert column[np.array([[2, 0]])].tolist() == [["ü", "a"]]
    assert column[1:].tolist() == column[np.array([False, True, True])].tolist() == ["b", "ü"]
    assert column.take(np.array([1, 1])).to_pylist() == ["b", "b"]


@given(st.lists(st.none() | NAMES, max_size=20), st.integers(1, 7))
def test_json_in_pieces_is_that_of_json_dumps(column: list[str | None], rows: int) -> None:
    columns = {"x": column, "is": [True] * len(column), "a b": [0.5] * len(column)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(texts, "ROWS", rows)
        pieces = list(json_of_columns([(name, pa.array(values)) for name, values in columns.items()]))
    assert "".join(pieces) == json.dumps(columns, sort_keys=True, separators=(",", ":"))
    assert text_digest(pieces) == json_digest(columns)
