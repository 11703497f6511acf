"""Gather candidate lists from tables that come one after the other, with their rows in any order.

Ids become item numbers batch by batch, so that only one batch of strings is held, and lists are laid out for one block
of queries at a time: the memory used is little more than that of the lists.
"""

import mmap
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64, Int32

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists

QUERIES_PER_BLOCK = 1 << 14
_IDS = ("query_id", "gallery_id")


def gather_lists(
    batches: Iterable[pa.Table],
    catalogue: Catalogue,
    *,
    source: str = "this table",
    ignored: Set[str] = frozenset(),
    queries_per_block: int = QUERIES_PER_BLOCK,
) -> CandidateLists:
    """The candidate lists in the rows of all `batches`: queries in item order, each list best first.

    Columns are `query_id, gallery_id` and `distance` (small = same) or `score` (large = same; distance = -score), with
    or without `rank`. A list is ordered by (rank, distance, item), without ranks by (distance, item). Rows with an id
    in `ignored` are left out. Raises BadInput, naming `source`, for unknown ids, repeated pairs, values that are not
    finite, and distances that fall while the rank grows (they are similarities then).
    """
    gathering = _Gathering(catalogue, ignored, source)
    for batch in batches:
        gathering.add(batch)
    return gathering.lists(queries_per_block)


class _Rows(NamedTuple):
    """Rows of the tables as numbers: item numbers of query and candidate, distance and rank."""

    query: Int32[np.ndarray, " row"]
    item: Int32[np.ndarray, " row"]
    distance: Float32[np.ndarray, " row"]
    rank: np.ndarray
    """0 where the table has none."""

    def take(self, rows: np.ndarray) -> "_Rows":
        return _Rows(*(column[rows] for column in self))

    def sorted(self) -> "_Rows":
        """By (query, rank, distance, item), copied only if not sorted."""
        keys = (self.query, self.rank, self.distance, self.item)
        return self if _is_ascending(keys) else self.take(np.lexsort(keys[::-1]))


class _Chunk:
    """The rows of one batch ordered by query, with each query stored once: 8 to 16 bytes a row."""

    def __init__(self, rows: _Rows) -> None:
        if not (rows.query[1:] >= rows.query[:-1]).all():
            rows = rows.take(np.argsort(rows.query, kind="stable"))
        # [distinct query]: where its rows start and how many they are; one more start is the end.
        self.queries, starts, self.counts = np.unique(rows.query, return_index=True, return_counts=True)
        self._starts = np.append(starts, len(rows.query))
        # A broadcast column, one number repeated, takes no memory; a copy of it would.
        self._columns = [column if column.strides == (0,) else _in_own_pages(column) for column in rows[1:]]

    def between(self, first: int, last: int) -> _Rows:
        """The rows of all queries from `first` to `last`."""
        low, high = np.searchsorted(self.queries, [first, last + 1])
        part = slice(self._starts[low], self._starts[high])
        query = np.repeat(self.queries[low:high], self.counts[low:high])
        return _Rows(query, *(column[part] for column in self._columns))


class _Bad:
    """Number of rows with a fault, and the first of them, counted from 1."""

    def __init__(self) -> None:
        self.count, self.first = 0, 0

    def note(self, is_bad: np.ndarray, offset: int) -> None:
        if is_bad.any():
            self.first = self.first or offset + int(is_bad.argmax()) + 1
            self.count += int(is_bad.sum())


class _Gathering:
    """Collects the rows of all batches as numbers, and their faults."""

    def __init__(self, catalogue: Catalogue, ignored: Set[str], source: str) -> None:
        self._catalogue, self._ignored, self._source = catalogue, ignored, source
        self._names = pa.array(catalogue.ids, pa.string())
        self._chunks: list[_Chunk] = []
        self._columns: set[str] | None = None
        self._n_rows = 0
        self._not_finite, self._empty, self._no_rank = _Bad(), _Bad(), _Bad()
        self._unknown: set[str] = set()

    def add(self, batch: pa.Table) -> None:
        value = self._check_columns(batch.column_names)
        numbers = _numbers(batch[value])
        self._not_finite.note(~np.isfinite(numbers), self._n_rows)
        distance = (numbers if value == "distance" else -numbers).astype(np.float32)
        rank = np.broadcast_to(np.int8(0), len(batch))  # takes no memory
        if "rank" in batch.column_names:
            rank = _as_int32(_numbers(batch["rank"]))
            self._no_rank.note(~np.isfinite(rank), self._n_rows)
        query, item = self._items(batch)
        self._n_rows += len(batch)
        is_known = (query >= 0) & (item >= 0)
        if is_known.any() and not self._is_bad:
            rows = _Rows(query, item, distance, rank)
            self._chunks.append(_Chunk(rows if is_known.all() else rows.take(is_known)))

    def lists(self, queries_per_block: int) -> CandidateLists:
        """The lists, laid out block by block; each chunk is dropped after its last query."""
        self._raise_if_bad()
        # [item]: the number of candidates of each item; those that have any are the queries.
        counts = np.zeros(len(self._catalogue), np.int64)
        for chunk in self._chunks:
            counts[chunk.queries] += chunk.counts
        queries = np.flatnonzero(counts)
        # [query, longest list], filled block by block.
        shape = (len(queries), int(counts.max(initial=0)))
        items, distances = np.empty(shape, np.int64), np.empty(shape, np.float32)
        for start, stop in sharding.blocks(len(queries), queries_per_block):
            block = slice(start, stop)
            self._lay_out(queries[block], counts[queries[block]], items[block], distances[block])
            self._chunks = [chunk for chunk in self._chunks if chunk.queries[-1] > queries[stop - 1]]
        return CandidateLists.from_arrays(queries.astype(np.int64), items, distances)

    def _lay_out(self, queries: np.ndarray, counts: np.ndarray, items: np.ndarray, distances: np.ndarray) -> None:
        """Write the lists of a block of queries, `counts` long, into `items` and `distances` [query, longest list]."""
        # The block's rows from all chunks, ordered by query and within a query from best to worst.
        parts = [chunk.between(int(queries[0]), int(queries[-1])) for chunk in self._chunks]
        rows = _Rows(*(np.concatenate(column) for column in zip(*parts, strict=True))).sorted()
        # [candidate]: the list that each row belongs to, and its place there, counted from where the list starts.
        row = np.repeat(np.arange(len(queries)), counts)
        column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        items[:], distances[:] = -1, np.inf
        items[row, column], distances[row, column] = rows.item, rows.distance
        # In sorted rows [query, longest list] a repeated item stands next to itself; -1 may repeat.
        ids = self._catalogue.ids
        ordered = np.sort(items.astype(np.int32), axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            row, column = np.argwhere(twice)[0]
            pair = f"query {ids[queries[row]]!r} and gallery item {ids[ordered[row, column]]!r}"
            raise BadInput(f"{self._source}: {pair} are paired twice; keep each pair once")
        # [query]: whether any distance in the list is smaller than the one before it.
        falls = (distances[:, 1:] < distances[:, :-1]).any(axis=1)
        if falls.any():
            raise BadInput(
                f"{self._source}: distances of query {ids[queries[falls.argmax()]]!r} fall where the rank grows; "
                "if they are similarities, call the column score"
            )

    def _items(self, batch: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Item numbers of both columns [row]; -1 = ignored, unknown or empty."""
        queries, gallery = (self._texts(batch[name], name) for name in _IDS)
        self._empty.note(_is_null(queries) | _is_null(gallery), self._n_rows)
        # A query mostly has its rows together: one look-up per run of equal queries, and one per gallery id.
        runs = pc.call_function("run_end_encode", [queries])
        wanted = pa.concat_arrays([runs.values, gallery])
        found = pc.call_function("index_in", [wanted], pc.SetLookupOptions(self._names))
        if found.null_count:
            lost = wanted.filter(found.is_null()).unique().drop_null().to_pylist()
            self._unknown.update(set(lost) - self._ignored)
        # The answers [runs + rows]: those of the runs repeated for each of their rows, then those of the gallery ids.
        items = found.fill_null(-1).to_numpy()
        n_runs = len(runs.values)
        lengths = np.diff(runs.run_ends.to_numpy(), prepend=0)
        return np.repeat(items[:n_runs], lengths), items[n_runs:]

    def _texts(self, column: pa.ChunkedArray, name: str) -> pa.Array:
        try:
            texts = column.cast(pa.string()).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise BadInput(f"{self._source}: column {name} is {column.type}; ids are text") from error
        return pa.concat_arrays(texts.chunks) if isinstance(texts, pa.ChunkedArray) else texts

    def _check_columns(self, names: Sequence[str]) -> str:
        """Name of the column that holds the values; all batches must have the same columns."""
        values = [name for name in ("distance", "score") if name in names]
        known = {*_IDS, "rank", "distance", "score"}
        is_same = self._columns is None or self._columns == set(names)
        if len(values) != 1 or not is_same or not set(_IDS) <= set(names) <= known:
            raise BadInput(
                f"{self._source}: columns {list(names)}; candidates have query_id, gallery_id, "
                "distance or score, and optionally rank"
            )
        self._columns = set(names)
        return values[0]

    @property
    def _is_bad(self) -> bool:
        """Whether a fault was found; later batches are then read only to count faults."""
        return bool(self._not_finite.count or self._empty.count or self._no_rank.count or self._unknown)

    def _raise_if_bad(self) -> None:
        if self._not_finite.count:
            name = "score" if "score" in (self._columns or ()) else "distance"
            found = f"{self._not_finite.count} values of {name} are not finite, first in row {self._not_finite.first}"
            raise BadInput(f"{self._source}: {found}")
        if self._empty.count:
            found = f"{self._empty.count} rows without query_id or gallery_id, first row {self._empty.first}"
            raise BadInput(f"{self._source}: {found}")
        if self._no_rank.count:
            raise BadInput(f"{self._source}: some ranks are empty or no numbers; fill them or remove the column")
        if self._unknown:
            self._catalogue.items_of(sorted(self._unknown))


def _in_own_pages(column: np.ndarray) -> np.ndarray:
    """A copy in memory pages of its own: they return to the system with the array, which allocators would not do."""
    pages = mmap.mmap(-1, max(column.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, column.dtype, len(column))
    copy[:] = column
    return copy


def _numbers(column: pa.ChunkedArray) -> Float64[np.ndarray, " row"]:
    """The values as float64; NaN where a cell is empty or not a number."""
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return column.cast(pa.float64()).to_numpy()
    return np.asarray(pd.to_numeric(column.to_pandas(), errors="coerce"), dtype=np.float64)


def _as_int32(ranks: np.ndarray) -> np.ndarray:
    """The ranks as int32 if all of them fit, else unchanged."""
    if not np.isfinite(ranks).all() or np.abs(ranks).max(initial=0) >= 1 << 31:
        return ranks
    integers = ranks.astype(np.int32)
    return integers if np.array_equal(integers, ranks) else ranks


def _is_null(column: pa.Array) -> np.ndarray:
    return column.is_null().to_numpy(zero_copy_only=False)


def _is_ascending(keys: Sequence[np.ndarray]) -> bool:
    """Whether the rows are ordered by the keys, the first one first."""
    # Whether each row is smaller than the one before it: by the last key, then by the last two, and so on.
    falls = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in reversed(keys):
        falls = (key[1:] < key[:-1]) | ((key[1:] == key[:-1]) & falls)
    return not falls.any()
