"""Read CSV that other programs wrote as batches of text columns: the layout is recognised, every row is counted.

pyarrow reads the file as long as it is plain. From the first row that has another number of fields than the header, or
quotes in an unusual place, Python's csv module reads on: it knows the rows' numbers and is strict about quotes.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv

from distributed_rerank.errors import BadInput

Open = Callable[[], io.BufferedIOBase]
"""Opens the file anew, from its first byte."""

_SEPARATORS = (",", ";", "\t", "|")
_BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_UTF8_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 22
_MAX_BAD_ROWS = 10_000
_MOST_LINES_ABOVE = 20
"""Comments, `sep=;` and titles that programs write above a header."""


@dataclass(frozen=True)
class CsvLayout:
    """How a CSV file is written, and the names of its columns."""

    separator: str
    header: Sequence[str]


class _NeedsCare(Exception):
    """The file has quotes that two readers may understand differently."""


def as_utf8(open_file: Open, head: bytes) -> Open:
    """The same file as UTF-8 without a byte order mark; UTF-16 and UTF-32 are known by theirs."""
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return lambda: io.BufferedReader(_Transcoded(open_file(), encoding))
    return (lambda: _without_bom(open_file())) if head.startswith(_UTF8_BOM) else open_file


def layout_of(head: bytes, known: Set[str]) -> CsvLayout:
    """The layout of UTF-8 CSV that begins with `head`: the separator with which its header has most `known` columns.

    Where it has none of them, most columns of any name, so that an error can list them.
    """
    text = head.decode("utf-8", errors="replace")
    best = CsvLayout(",", ())
    best_rank = (-1, 0)
    for separator in _SEPARATORS:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        header = next((row for row in rows if row), [])
        n_known = len(known & set(header))
        rank = (n_known, 0 if n_known else len(header))
        if rank > best_rank:
            best, best_rank = CsvLayout(separator, header), rank
    return best


def line_of_header(head: bytes, known: Set[str]) -> int | None:
    """The line, counted from 1, below the first one in which two of the `known` names stand; None: there is none."""
    lines = head.decode("utf-8", errors="replace").splitlines()[:_MOST_LINES_ABOVE]
    headers = ((number, set(layout_of(line.encode(), known).header)) for number, line in enumerate(lines[1:], 2))
    return next((number for number, header in headers if len(known & header) > 1), None)


def other_separator(head: bytes, known: Set[str]) -> str | None:
    """What stands between the names of a header where that is none of the separators that are read."""
    line = head.decode("utf-8", errors="replace").lstrip().partition("\n")[0]
    between = re.split(rf"\b(?:{'|'.join(map(re.escape, known))})\b", line)[1:-1]
    is_one = len(between) > 1 and len(set(between)) == 1 and not re.search(r"\w", between[0])
    return between[0] if is_one and between[0] not in _SEPARATORS else None


def csv_batches(
    open_file: Open, layout: CsvLayout, columns: Sequence[str], rows: int, source: str
) -> Iterator[pa.Table]:
    """The `columns` of a UTF-8 file as tables of strings, at most `rows` rows each; blank lines are no rows.

    Raises BadInput, naming `source` and rows counted from 1 after the header, for rows with more or fewer fields than
    the header (surplus empty fields at the end are dropped); csv.Error for quotes that do not match and for bytes that
    are not UTF-8.
    """
    n_read = 0
    # What the fast reader refuses the careful one goes on with, or says what is wrong.
    with suppress(_NeedsCare, pa.ArrowInvalid, UnicodeDecodeError):
        for table in _plain_batches(open_file, layout, columns, rows):
            yield table
            n_read += len(table)
        return
    yield from _careful_batches(open_file, layout, columns, rows, source, skip=n_read)


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of all tables in tables of `rows` rows; the last is shorter."""
    held: list[pa.Table] = []
    n_held = 0
    for table in tables:
        start = 0
        while n_held + len(table) - start >= rows:
            part = table.slice(start, rows - n_held)
            yield pa.concat_tables([*held, part])
            start, held, n_held = start + len(part), [], 0
        if start < len(table):
            held, n_held = [*held, table.slice(start)], n_held + len(table) - start
    if held:
        yield pa.concat_tables(held)


def _plain_batches(open_file: Open, layout: CsvLayout, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
    with (
        open_file() as file,
        arrow_csv.open_csv(
            pa.PythonFile(_QuoteWatch(file, layout.separator), "r"),
            read_options=arrow_csv.ReadOptions(block_size=_BLOCK),
            parse_options=arrow_csv.ParseOptions(delimiter=layout.separator, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in columns},
                include_columns=list(columns),
                strings_can_be_null=False,
            ),
        ) as reader,
    ):
        yield from regrouped((pa.Table.from_batches([batch]) for batch in reader), rows)


class _QuoteWatch(io.RawIOBase):
    """Passes bytes on, and raises _NeedsCare where a quote neither encloses a field nor is doubled within one."""

    def __init__(self, file: io.BufferedIOBase, separator: str) -> None:
        super().__init__()
        self._file = file
        self._beside = np.zeros(256, bool)
        """[byte]: whether it may stand before an opening and after a closing quote."""
        self._beside[[ord(separator), ord("\n"), ord("\r"), ord('"')]] = True
        self._n_quotes, self._last = 0, ord("\n")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        self._check(np.frombuffer(block, np.uint8))
        buffer[: len(block)] = block
        return len(block)

    def _check(self, block: np.ndarray) -> None:
        is_closed = self._n_quotes % 2 == 0
        if not len(block):
            if not is_closed:
                raise _NeedsCare
            return
        # The last byte of the block before was a closing quote: what follows it comes only now.
        if self._last == ord('"') and is_closed and self._n_quotes and not self._beside[block[0]]:
            raise _NeedsCare
        places = np.flatnonzero(block == ord('"'))
        # [quote]: every other one opens, since a doubled quote within a field closes it and opens it again.
        opens = (self._n_quotes + np.arange(len(places))) % 2 == 0
        before = np.where(places > 0, block[places - 1], self._last)
        after = block[np.minimum(places + 1, len(block) - 1)]
        is_bad = np.where(opens, ~self._beside[before], ~self._beside[after] & (places + 1 < len(block)))
        if is_bad.any():
            raise _NeedsCare
        self._n_quotes += len(places)
        self._last = int(block[-1])


def _careful_batches(
    open_file: Open, layout: CsvLayout, columns: Sequence[str], rows: int, source: str, skip: int
) -> Iterator[pa.Table]:
    """The rows after the first `skip`, by Python's csv module."""
    positions = [layout.header.index(name) for name in columns]
    held: list[list[str]] = []
    for row in _checked_rows(open_file, layout, source, skip):
        held.append(row)
        if len(held) == rows:
            yield _table(held, columns, positions)
            held = []
    yield _table(held, columns, positions)


def _table(held: list[list[str]], columns: Sequence[str], positions: Sequence[int]) -> pa.Table:
    cells = [pa.array([row[position] for row in held], pa.string()) for position in positions]
    return pa.Table.from_arrays(cells, names=list(columns))


def _checked_rows(open_file: Open, layout: CsvLayout, source: str, skip: int) -> Iterator[list[str]]:
    width, number = len(layout.header), 0
    bad: dict[int, list[int]] = {}
    text = io.TextIOWrapper(cast(Any, open_file()), encoding="utf-8", newline="")
    reader = csv.reader(text, delimiter=layout.separator, strict=True)
    try:
        has_header = False
        for row in reader:
            if not row or (width > 1 and len(row) == 1 and not row[0].strip()):
                continue
            if not has_header:
                has_header = True
                continue
            number += 1
            if len(row) < width or any(row[width:]):
                bad.setdefault(len(row), []).append(number)
                if number > _MAX_BAD_ROWS and sum(map(len, bad.values())) > _MAX_BAD_ROWS:
                    break
            elif number > skip and not bad:
                yield row
    except csv.Error as error:
        raise csv.Error(
            f"quotes do not match from row {number + 1} on ({error}); put cells with quotes in quotes and double the "
            "quotes inside"
        ) from error
    except UnicodeDecodeError as error:
        raise csv.Error(_first_undecodable(open_file())) from error
    if bad:
        raise BadInput(f"{source}: {_wrong_widths(bad, layout)}")


def _wrong_widths(bad: dict[int, list[int]], layout: CsvLayout) -> str:
    width = len(layout.header)
    found = []
    for n_fields, numbers in bad.items():
        shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
        rows = f"row {shown} has" if len(numbers) == 1 else f"rows {shown} have"
        found.append(f"{rows} {n_fields} field{'' if n_fields == 1 else 's'}")
    fixes = []
    if max(bad) > width:
        fixes.append(f"put cells that contain {layout.separator!r} in quotes")
    if min(bad) < width:
        fixes.append("give every row all fields, empty ones too")
    return f"{'; '.join(found[:3])}, where the header has {width}; {' and '.join(fixes)}"


def _first_undecodable(file: io.BufferedIOBase) -> str:
    """What is said of the first line that is not UTF-8."""
    with file as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); the file looks like Latin-1 or "
                    "Windows-1252: save it as UTF-8"
                )
    return "the text ends within a character; the file is cut off"


class _Transcoded(io.RawIOBase):
    """A file in another encoding as UTF-8."""

    def __init__(self, file: io.BufferedIOBase, encoding: str) -> None:
        super().__init__()
        self._file = file
        self._stream = pa.transcoding_input_stream(pa.PythonFile(file, "r"), encoding, "utf-8")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _without_bom(file: io.BufferedIOBase) -> io.BufferedIOBase:
    file.read(len(_UTF8_BOM))
    return file
