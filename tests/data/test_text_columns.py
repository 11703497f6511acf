"""Names are text: what a column of any type becomes, and what would fall together."""

import datetime
import decimal
import io
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_rerank.data.text_columns import (
    are_words_for_no_value,
    as_names,
    as_numbers,
    as_texts,
    float_bits,
    is_index_column,
    refuse_equal_numbers,
)
from distributed_rerank.errors import BadInput


def names_of(column: pa.Array) -> list[str | None]:
    """The names of a column of any type."""
    return as_names(as_texts(column, "label"), "label", float_bits(column.type)).to_pylist()


def csv_names_of(column: pd.Series) -> list[str | None]:
    """The names of the column after pandas wrote it to CSV, all cells read as text."""
    text = column.to_frame("label").assign(end="end").to_csv(index=False)
    convert = pyarrow.csv.ConvertOptions(column_types={"label": pa.string()}, strings_can_be_null=False)
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(io.BytesIO(text.encode()), parse_options=parse, convert_options=convert)
    return names_of(table["label"].combine_chunks())


KEPT = ["01", "1", "007", "-0", "0", "+1", "1e5", "1E5", "0x1", "1_000", "1,5", "7.50", "7.00", "07.0", "1.", ".5",
        "4006381333931", str(2**60), str(2**60 + 1), "9007199254740993", "9007199254740993.0", " x", "z ", "é", "٣",
        "true", "na", "na.0", "inf", "v1.0", "1.0.0", "1e+5", "00", "-", "2024-01-02"]  # fmt: skip


def test_texts_are_names_as_they_are_written() -> None:
    assert names_of(pa.array(KEPT)) == KEPT
    for name in KEPT:
        assert names_of(pa.array([name, None])) == [name, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["7.0", "8.0", None, "12.0"], ["7", "8", None, "12"]),
        (["-3.0", "0.0"], ["-3", "0"]),
        (["-0.0", "1.0"], ["-0", "1"]),
        (["7.0", "x"], ["7.0", "x"]),
        (["7.0", "7.5"], ["7.0", "7.5"]),
        (["7.0", "08"], ["7.0", "08"]),
        (["4006381333931.0"], ["4006381333931"]),
        (["9007199254740991.0", "1.0"], ["9007199254740991", "1"]),
    ],
)
def test_only_a_column_of_whole_floats_loses_its_points(values: list, expected: list) -> None:
    assert names_of(pa.array(values)) == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([2**60, 2**60 + 1, None]), [str(2**60), str(2**60 + 1), None]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([7, None], pa.float64()), ["7", None]),
        (pa.array([7, 7.5]), ["7.0", "7.5"]),
        (pa.array([0.1, 3], pa.float32()), ["0.1", "3.0"]),
        (pa.array([math.nan, 3], pa.float32()), [None, "3"]),
        (pa.array(np.array([3, 2], np.float16)), ["3", "2"]),
        (pa.array([True, False, None]), ["True", "False", None]),
        (pa.array([decimal.Decimal("7"), decimal.Decimal("12")], pa.decimal128(5, 0)), ["7", "12"]),
        (pa.array([decimal.Decimal("7.00")]), ["7.00"]),
        (pa.array([datetime.date(2024, 1, 2)]), ["2024-01-02"]),
        (pa.array([b"caf\xc3\xa9"]), ["café"]),
        (pa.array(["a", None, "01"]).dictionary_encode(), ["a", None, "01"]),
        (pa.array([1.0, None, 2.0]).dictionary_encode(), ["1", None, "2"]),
        (pa.array(["01", "b"], pa.large_string()), ["01", "b"]),
        (pa.array(["01", "b"], pa.string_view()), ["01", "b"]),
        (pa.nulls(2), [None, None]),
        (pa.array(["", " ", "\t\u00a0", "a"]), [None, None, None, "a"]),
    ],
)
def test_columns_of_other_types_are_what_pandas_writes(column: pa.Array, expected: list) -> None:
    assert names_of(column) == expected
    in_two = pa.chunked_array([column[:1], column[1:]])
    assert as_texts(in_two, "label").to_pylist() == as_texts(column, "label").to_pylist()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["a"]]),
        pa.array([{"a": 1}]),
        pa.array([datetime.datetime(2024, 1, 2)]),
        pa.array([datetime.timedelta(1)]),
        pa.array([datetime.time(1)]),
        pa.array([b"0123456789abcdef"], pa.binary(16)),
        pa.array([b"\xff\xfe"]),
    ],
)
def test_columns_without_one_text_are_refused_by_name(column: pa.Array) -> None:
    with pytest.raises(BadInput, match=r"column 'sequence' .*; write it as text"):
        as_texts(column, "sequence")


@pytest.mark.parametrize(
    ("values", "first", "second"),
    [
        (["x", "7", "8", "7.0"], r"'7' \(row 2\)", r"'7.0' \(row 4\)"),
        (["0.0", "-0.0"], r"'-0.0' \(row 2\)", r"'0.0' \(row 1\)"),
        (["10000000000000000", "1e+16"], r"'10000000000000000' \(row 1\)", r"'1e\+16' \(row 2\)"),
    ],
)
def test_two_spellings_of_one_number_name_both_rows(values: list, first: str, second: str) -> None:
    with pytest.raises(BadInput, match=f"label {first} and {second} are the same number in two spellings"):
        names_of(pa.array(values))


def test_two_tables_may_not_spell_a_number_in_two_ways() -> None:
    tables = {"q.csv": pa.array(["x", "7"], pa.large_string()), "g.csv": pa.array(["7.0", "y"], pa.large_string())}
    with pytest.raises(BadInput, match=r"label '7' \(row 2 of q.csv\) and '7.0' \(row 1 of g.csv\)"):
        refuse_equal_numbers(tables, "label")
    refuse_equal_numbers(tables | {"g.csv": pa.array(["7.50", "07"], pa.large_string())}, "label")


@pytest.mark.parametrize(
    "column", [pa.array([2.0**53, 1.0]), pa.array([2.0**24], pa.float32()), pa.array(["1e+16", "1.0"])]
)
def test_floats_that_cannot_hold_the_number_are_refused(column: pa.Array) -> None:
    with pytest.raises(BadInput, match="lose their last digits"):
        names_of(column)


@pytest.mark.parametrize(
    "word", ["NA", "null", "NULL", "None", "none", "nan", "NaN", "NAN", "-nan", "<NA>", "\\N", "N/A", "n/a", "#N/A",
             "NaT", " NULL ", "1.#QNAN"],
)  # fmt: skip
def test_words_for_no_value_are_known(word: str) -> None:
    assert are_words_for_no_value(pa.array([word, None, f"{word}x"], pa.large_string())).tolist() == [
        True,
        False,
        False,
    ]


def test_names_that_only_look_like_no_value_are_names() -> None:
    names = ["na", "Na", "nano", "nullable", "N", "-", "?", "0", "no", "Nanna", "none of these", "north america (NA)"]
    assert not are_words_for_no_value(pa.array(names, pa.large_string())).any()


def test_numbers_of_any_column() -> None:
    for column in (["1", " 2.5", "", "x"], ["1", "2.5", None, "nan"]):
        assert np.array_equal(as_numbers(pa.chunked_array([column])), [1, 2.5, np.nan, np.nan], equal_nan=True)
    assert as_numbers(pa.chunked_array([[decimal.Decimal("1.5")]])).tolist() == [1.5]
    assert np.isnan(as_numbers(pa.chunked_array([[True], [False]]))).all()
    assert np.isnan(as_numbers(pa.chunked_array([[[1.0]]]))).all()


def test_index_columns_of_pandas_are_known() -> None:
    assert all(map(is_index_column, ["", "Unnamed: 0", "Unnamed: 12", "__index_level_0__", "index", "level_0"]))
    assert not any(map(is_index_column, ["id", "unnamed", "Unnamed", "indexed", "label", "level"]))


letters = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=6)
number_like = st.sampled_from([*KEPT, "7", "7.0", "8.0", "-1.0", "0.0", "1e+16", "nan", "NULL", ""])


def outcome_of(read: object, *arguments: object) -> object:
    """What a function returns, or the message of its BadInput."""
    try:
        return read(*arguments)  # type: ignore[operator]
    except BadInput as error:
        return str(error)


@given(st.lists(st.one_of(letters, number_like), min_size=1, max_size=8))
def test_texts_agree_between_csv_and_parquet(values: list[str]) -> None:
    column = pd.Series(values, dtype=object)
    assert outcome_of(csv_names_of, column) == outcome_of(names_of, pa.array(values))


whole = st.integers(-(2**62), 2**62)
floats = st.floats(width=64) | st.integers(-1000, 1000).map(float)


@given(st.lists(st.none() | whole, min_size=1, max_size=8))
def test_integers_agree_between_csv_and_parquet_and_keep_every_digit(values: list) -> None:
    expected = [None if value is None else str(value) for value in values]
    assert names_of(pa.array(values, pa.int64())) == expected
    assert csv_names_of(pd.Series(values, dtype="Int64")) == expected


@given(st.lists(st.none() | floats, min_size=1, max_size=8))
def test_floats_agree_between_csv_and_parquet(values: list) -> None:
    column = pd.Series(values, dtype=float)
    from_parquet = outcome_of(names_of, pa.array(values, pa.float64(), from_pandas=True))
    assert outcome_of(csv_names_of, column) == from_parquet
    present = [value for value in values if value is not None and not math.isnan(value)]
    if isinstance(from_parquet, list):
        assert [float(name) for name in from_parquet if name is not None] == present
        has_points = any(set(name) & set(".ein") for name in from_parquet if name is not None)
        assert has_points != all(value.is_integer() for value in present)


@given(st.lists(letters | number_like, min_size=1, max_size=8))
def test_different_texts_never_become_one_name(values: list[str]) -> None:
    texts = as_texts(pa.array(values), "label")
    names = outcome_of(as_names, texts, "label")
    if not isinstance(names, str):
        pairs = set(zip(texts.to_pylist(), names.to_pylist(), strict=True))  # type: ignore[attr-defined]
        assert len(pairs) == len({text for text, _ in pairs}) == len({name for _, name in pairs})
