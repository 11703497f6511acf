"""CSV of any layout against Python's csv module, in batches of any size."""

import csv
import io
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_rerank.data.csv_files import csv_batches, layout_of, regrouped
from distributed_rerank.data.table_files import TableFile
from distributed_rerank.errors import BadInput


def read(content: bytes, rows: int = 100, columns: tuple[str, ...] = ("id", "label")) -> list[tuple[str, ...]]:
    """The rows of the columns, by our reader."""
    layout = layout_of(content, set(columns))
    tables = list(csv_batches(lambda: io.BytesIO(content), layout, columns, rows, "x.csv"))
    assert all(len(table) <= rows for table in tables)
    return [row for table in tables for row in zip(*(table[name].to_pylist() for name in columns), strict=True)]


def error_of(content: bytes) -> str:
    with pytest.raises((BadInput, csv.Error)) as error:
        read(content)
    return str(error.value)


# Python writes a lone carriage return without quotes, and it then ends a line.
cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=5) | st.sampled_from(
    ['"', '""', '"a', 'a"b', ",", ";", "\n", "\r\n", " ", "", '12" pan', "a,b", "ä", "#", "'"]
)


@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=12),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 5),
)
def test_what_csv_wrote_is_read_back(table: list, separator: str, quoting: int, line_end: str, rows: int) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=line_end)  # type: ignore[arg-type]
    writer.writerow(["id", "note", "label"])
    writer.writerows(table)
    assert read(text.getvalue().encode(), rows) == [(first, last) for first, _, last in table]


@given(st.lists(st.sampled_from(['"', ",", "\n", "a", "b", " ", "\r\n"]), max_size=14).map("".join))
def test_any_text_is_read_as_csv_reads_it_or_refused(body: str) -> None:
    """Never other cells than a strict reader's, never rows of another width, whichever of our two readers it was."""
    reader = csv.reader(io.StringIO(f"id,label\n{body}", newline=""), strict=True)
    try:
        _, *rows = reader
    except csv.Error:
        assert "quotes do not match" in error_of(f"id,label\n{body}".encode())
        return
    rows = [row for row in rows if row and (len(row) > 1 or row[0].strip())]
    if any(len(row) < 2 or any(row[2:]) for row in rows):
        assert "where the header has 2" in error_of(f"id,label\n{body}".encode())
    else:
        assert read(f"id,label\n{body}".encode(), 3) == [tuple(row[:2]) for row in rows]


def test_odd_quote_far_into_the_file_loses_and_repeats_no_row() -> None:
    """Rows that the fast reader has given already are not given again by the careful one."""
    lines = [f"{number},label {number % 7}" for number in range(600_000)]
    lines[-5] = '599995,12" pan'
    content = ("id,label\n" + "\n".join(lines) + "\n").encode()
    assert len(content) > 1 << 23, "the file has several blocks"
    found = read(content, 1000)
    assert found[-5] == ("599995", '12" pan')
    assert [row[0] for row in found] == [str(number) for number in range(600_000)]


def test_wrong_rows_far_into_the_file_have_their_numbers() -> None:
    lines = [f"{number},x" for number in range(1, 400_001)]
    for row in (399_000, 399_999):
        lines[row - 1] += ",y"
    lines[10] = "11"
    message = error_of(("id,label\n" + "\n".join(lines) + "\n").encode())
    assert "row 11 has 1 field; rows 399000, 399999 have 3 fields, where the header has 2" in message
    assert "put cells that contain ',' in quotes and give every row all fields" in message


def test_quotes_at_the_edge_of_a_block_are_no_odd_ones() -> None:
    """A closing quote may be the last byte of a block and an opening one the first."""
    row = '"a","b"\n'
    for shift in range(len(row)):
        content = ("id,label\n" + "x" * shift + ",y\n" + row * 600_000).encode()
        layout = layout_of(content[:100], {"id", "label"})
        tables = csv_batches(lambda content=content: io.BytesIO(content), layout, ["id"], 1 << 20, "x.csv")
        counts = pa.concat_tables(tables)["id"].value_counts().to_pylist()
        assert {entry["values"]: entry["counts"] for entry in counts} == {"x" * shift: 1, "a": 600_000}


def test_blank_lines_and_trailing_empty_fields_are_no_fault() -> None:
    assert read(b"\nid,label\n\na,b,,\n   \nc,d\n\n") == [("a", "b"), ("c", "d")]
    assert read(b"id,label") == read(b"id,label\n") == []
    assert read(b"label,id,\nb,a,\n") == [("a", "b")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separator_is_the_one_that_fits_the_columns(separator: str) -> None:
    assert layout_of(separator.join(["id", "label"]).encode() + b"\nx,y;z", {"id", "label"}).separator == separator


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_header_without_known_names_is_split_for_the_error(separator: str) -> None:
    head = separator.join(["bild", "sorte"]).encode() + b"\nx\n"
    assert layout_of(head, {"id", "label"}).header == ["bild", "sorte"]


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 5))
def test_regrouped_tables_have_the_same_rows(lengths: list[int], rows: int) -> None:
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    tables = [pa.table({"n": range(a, a + n)}) for a, n in zip(starts, lengths, strict=True)]
    tables = [table.cast(pa.schema({"n": pa.int64()})) for table in tables]
    found = list(regrouped(tables, rows))
    assert [value for table in found for value in table["n"].to_pylist()] == list(range(sum(lengths)))
    assert all(len(table) == rows for table in found[:-1])
    assert all(0 < len(table) <= rows for table in found)


def test_utf_16_that_ends_within_a_character_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("id,label\na,b\n".encode("utf-16")[:-1])
    expected = "neither a readable CSV nor a Parquet table"
    with pytest.raises(BadInput, match=expected):
        list(TableFile(str(tmp_path / "x.csv"), frozenset(), "catalogue", expected).csv_batches(list, {"id"}, 10))
