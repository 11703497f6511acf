"""Open a table that other programs wrote, whatever it is: Parquet, CSV, a TREC run, packed by gzip or not.

The content decides, not the name. Formats that are not read are named in the error, with the fix.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from distributed_rerank.data.csv_files import as_utf8, csv_batches, layout_of, line_of_header, other_separator
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations

HEAD = 1 << 16
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_OTHERS = {
    rb"PK\x03\x04": ("a ZIP archive or an Excel workbook", "unpack it or save it as CSV"),
    rb"\xd0\xcf\x11\xe0": ("an Excel workbook", "save it as CSV"),
    rb"BZh[1-9]1AY&SY": ("packed by bzip2", "unpack it"),
    rb"\xfd7zXZ\x00": ("packed by xz", "unpack it"),
    rb"\x28\xb5\x2f\xfd": ("packed by Zstandard", "unpack it"),
    rb"ARROW1\x00\x00": ("an Arrow or Feather file", "save it as Parquet"),
    rb"SQLite format 3\x00": ("an SQLite database", "export the table as CSV"),
    rb"\x89HDF": ("an HDF5 file", "save it as Parquet"),
    rb"\x93NUMPY": ("a NumPy array", "save it as Parquet with named columns"),
    rb"\x80[\x02-\x05]": ("a Python pickle", "save it as Parquet"),
    rb"\s*(\{\s*\"[^\"\n]*\"\s*:|\[\s*\{)": ("JSON", "save it as CSV or Parquet"),
}
"""Patterns of the first bytes of formats that are not read; no id or column name is likely to begin so."""


class TableFile:
    """A file with one table: how it begins, and how it is opened anew."""

    def __init__(self, location: str, schemes: frozenset[str], role: str, formats: str) -> None:
        """`role` says in errors what the table is for, `formats` what it was expected to be."""
        self.location, self._formats = location, formats
        try:
            self._open = locations.opener(location, schemes)
            with self._open() as file:
                head = file.read(HEAD)
            packed = self._open if head.startswith(_GZIP) else None
            if packed is not None:
                self._open = lambda: _Unpacked(packed())
                with self._open() as file:
                    head = file.read(HEAD)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"cannot read the {role} {location}: {reason}; check the path") from error
        self.is_parquet = head.startswith(_PARQUET)
        if self.is_parquet and packed is not None:
            with self.reading(), self._open() as file:
                content = file.read()  # Parquet is read from its end, which a packed stream is slow to reach
            self._open = lambda: io.BytesIO(content)
        if not self.is_parquet:
            self._refuse_others(head)
            self._open = as_utf8(self._open, head)
            with self.reading(), self._open() as file:
                head = bytes(file.read(HEAD))
        self.head = head

    def open(self) -> io.BufferedIOBase:
        """The content from its first byte: of Parquet as it is, of text as UTF-8 without a byte order mark."""
        return self._open()

    def csv_batches(
        self, choose: Callable[[Sequence[str]], Sequence[str]], known: Set[str], rows: int
    ) -> Iterator[pa.Table]:
        """The columns that `choose` takes of the header, as strings; the separator is the one that `known` fit best."""
        layout = layout_of(self.head, known)
        if len(known & set(layout.header)) < 2 and (other := other_separator(self.head, known)):
            raise BadInput(f"{self.location}: {other!r} separates its columns; write one of , ; | and tabs")
        if len(known & set(layout.header)) < 2 and (line := line_of_header(self.head, known)):
            raise BadInput(f"{self.location}: line {line} looks like the header; remove the lines above it")
        columns = choose(layout.header)
        yield pa.table({name: pa.array([], pa.string()) for name in columns})
        if not columns:
            return
        with self.reading():
            yield from csv_batches(self._open, layout, columns, rows, self.location)

    def parquet_batches(self, choose: Callable[[Sequence[str]], Sequence[str]], rows: int) -> Iterator[pa.Table]:
        """The columns that `choose` takes of a Parquet file's, at most `rows` rows at a time, after a table without."""
        # With pre_buffer all that was read stays in memory to the end.
        with self.reading(), self._open() as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            columns = list(choose(parquet.schema_arrow.names))
            schema = parquet.schema_arrow
            yield pa.schema([schema.field(name) for name in columns]).empty_table()
            if columns:
                for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                    yield pa.Table.from_batches([batch])

    def parquet_table(self, choose: Callable[[Sequence[str]], Sequence[str]]) -> pa.Table:
        """The columns that `choose` takes of a Parquet file's."""
        with self.reading(), self._open() as file:
            parquet = pq.ParquetFile(file)
            return parquet.read(columns=list(choose(parquet.schema_arrow.names)))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, whatever says that the content is no table of these formats is raised as BadInput."""
        try:
            yield
        except (OSError, EOFError, zlib.error, UnicodeError, csv.Error, pa.ArrowException) as error:
            raise BadInput(f"{self.location} is {self._formats}: {_last_line(error)}") from error

    def _refuse_others(self, head: bytes) -> None:
        for pattern, (what, fix) in _OTHERS.items():
            if re.match(pattern, head):
                raise BadInput(f"{self.location} is {self._formats}, but {what}; {fix}")
        if not head.strip():
            raise BadInput(f"{self.location} is {self._formats}: it is empty; check the path")
        # UTF-16 has a zero in every other byte of Latin text; as_utf8 knows it where it begins with its mark.
        has_mark = head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.startswith(b"\x00\x00\xfe\xff")
        if not has_mark and head.count(0) > len(head) // 8:
            raise BadInput(
                f"{self.location} is {self._formats}: it holds zero bytes, as binary files do and UTF-16 without a "
                "byte order mark; save it as UTF-8"
            )


class _Unpacked(gzip.GzipFile):
    """The content of a packed file, which is closed with it."""

    def __init__(self, packed: io.BufferedIOBase) -> None:
        super().__init__(fileobj=packed)
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
