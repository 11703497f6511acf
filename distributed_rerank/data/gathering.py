"""Gather candidate lists from tables that come one after the other, with their rows in any order.

Ids become item numbers batch by batch, so that only one batch of strings is held, and lists are laid out for one block
of queries at a time: the memory used is little more than that of the lists.
"""

import logging
import mmap
import re
from collections.abc import Iterable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Float32, Int32

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.distance_kinds import Conversion
from distributed_rerank.data.item_lookup import EMPTY, PADDING, ItemLookup
from distributed_rerank.data.list_order import ListOrder
from distributed_rerank.data.text_columns import as_numbers, as_texts, is_index_column
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

logger = logging.getLogger(__name__)

QUERIES_PER_BLOCK = 1 << 14
_IDS = ("query_id", "gallery_id")
_LARGEST = np.finfo(np.float32).max


def gather_lists(
    batches: Iterable[pa.Table],
    catalogue: Catalogue,
    *,
    source: str = "this table",
    ignored: Set[str] = frozenset(),
    conversion: Conversion | None = None,
    queries_per_block: int = QUERIES_PER_BLOCK,
) -> CandidateLists:
    """The candidate lists in the rows of all `batches`: queries in item order, each list best first; int32 items.

    Columns are `query_id, gallery_id` and `distance` (small = same) or `score` (large = same; distance = -score), with
    or without `rank`; an index column that pandas wrote is ignored. A list is ordered by (rank, distance, item),
    without ranks by (distance, item). Rows with an id in `ignored` are left out, and so, with a warning, are rows with
    the gallery id -1, with which faiss fills up short lists. A query of which nothing is left has an empty list.
    `conversion` makes L2 distances of the values; None = they stay as they are.

    Raises BadInput, naming `source`, for unknown ids, repeated pairs, values that are not finite as float32, distances
    that fall while the rank grows (they are similarities then), and lists without ranks that look sorted the wrong way.
    """
    gathering = _Gathering(catalogue, ignored, source, conversion)
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

    def by_query(self) -> "_Rows":
        """In the order of the queries, rows of one query as before."""
        is_sorted = (self.query[1:] >= self.query[:-1]).all()
        return self if is_sorted else self.take(np.argsort(self.query, kind="stable"))

    def sorted(self) -> "_Rows":
        """By (query, rank, distance, item), copied only if not sorted."""
        keys = (self.query, self.rank, self.distance, self.item)
        return self if _is_ascending(keys) else self.take(np.lexsort(keys[::-1]))


class _Chunk:
    """The rows of one batch `by_query`, with each query stored once: 8 to 16 bytes a row."""

    def __init__(self, rows: _Rows) -> None:
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
    """Number of rows with a fault, and the first of them, counted from 1, with its value."""

    def __init__(self) -> None:
        self.count, self.first = 0, 0
        self.value: Any = None

    def note(self, is_bad: np.ndarray, offset: int, values: pa.ChunkedArray | None = None) -> None:
        if not is_bad.any():
            return
        if not self.count:
            row = int(is_bad.argmax())
            self.first = offset + row + 1
            self.value = None if values is None else values[row].as_py()
        self.count += int(is_bad.sum())


class _Gathering:
    """Collects the rows of all batches as numbers, and their faults."""

    def __init__(
        self, catalogue: Catalogue, ignored: Set[str], source: str, conversion: Conversion | None = None
    ) -> None:
        self._conversion = conversion
        self._catalogue, self._ignored, self._source = catalogue, ignored, source
        self._lookup = ItemLookup(catalogue.ids, catalogue.source, ignored)
        self._order: ListOrder | None = None
        self._is_named = np.zeros(len(catalogue), bool)
        """[item]: whether any row names it as a query."""
        self._n_padding = 0
        self._chunks: list[_Chunk] = []
        self._columns: set[str] | None = None
        self._n_rows = 0
        self._not_finite, self._empty, self._no_rank = _Bad(), _Bad(), _Bad()

    def add(self, batch: pa.Table) -> None:
        value = self._check_columns([name for name in batch.column_names if not is_index_column(name)])
        if not len(batch):
            return
        query, item = self._items(batch)
        is_padding = item == PADDING
        numbers = as_numbers(batch[value])
        # What does not fit in a float32 would become infinite; faiss writes the largest float32 for "no neighbour".
        self._not_finite.note(~(np.abs(numbers) < _LARGEST) & ~is_padding, self._n_rows, batch[value])
        distance = np.where(is_padding, 0, numbers if value == "distance" else -numbers)
        rank = np.broadcast_to(np.int8(0), len(batch))  # takes no memory
        if "rank" in batch.column_names:
            rank = _as_int32(as_numbers(batch["rank"]))
            self._no_rank.note(~np.isfinite(rank), self._n_rows)
        self._n_rows += len(batch)
        self._n_padding += int(is_padding.sum())
        self._is_named[query[query >= 0]] = True
        is_known = (query >= 0) & (item >= 0)
        if is_known.any() and not self._is_bad:
            if not is_known.all():
                query, item, distance, rank = (column[is_known] for column in (query, item, distance, rank))
            if self._conversion is not None:
                distance = self._conversion.convert(distance, is_score=value == "score")
            rows = _Rows(query, item, distance.astype(np.float32), rank).by_query()
            if "rank" not in batch.column_names:
                self._order = self._order or ListOrder(len(self._catalogue))
                self._order.add(rows.query, rows.item, rows.distance)
            self._chunks.append(_Chunk(rows))

    def lists(self, queries_per_block: int) -> CandidateLists:
        """The lists, laid out block by block; each chunk is dropped after its last query."""
        self._raise_if_bad()
        if self._n_padding:
            logger.warning("%s: %d rows with gallery_id -1 are padding and left out", self._source, self._n_padding)
        # [item]: the number of candidates of each item; the queries are those that any row names.
        counts = np.zeros(len(self._catalogue), np.int32)
        for chunk in self._chunks:
            counts[chunk.queries] += chunk.counts
        queries = np.flatnonzero(self._is_named)
        # [query, longest list], filled block by block.
        shape = (len(queries), int(counts.max(initial=0)))
        items, distances = np.empty(shape, np.int32), np.empty(shape, np.float32)
        for start, stop in sharding.blocks(len(queries), queries_per_block):
            block = slice(start, stop)
            self._lay_out(queries[block], counts[queries[block]], items[block], distances[block])
            self._chunks = [chunk for chunk in self._chunks if chunk.queries[-1] > queries[stop - 1]]
        return CandidateLists.from_arrays(queries.astype(np.int64), items, distances)

    def _lay_out(self, queries: np.ndarray, counts: np.ndarray, items: np.ndarray, distances: np.ndarray) -> None:
        """Write the lists of a block of queries, `counts` long, into `items` and `distances` [query, longest list]."""
        items[:], distances[:] = -1, np.inf
        if not counts.any():
            return
        # The block's rows from all chunks, ordered by query and within a query from best to worst.
        parts = [chunk.between(int(queries[0]), int(queries[-1])) for chunk in self._chunks]
        rows = _Rows(*(np.concatenate(column) for column in zip(*parts, strict=True))).sorted()
        # [candidate]: the list that each row belongs to, and its place there, counted from where the list starts.
        row = np.repeat(np.arange(len(queries)), counts)
        column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        items[row, column], distances[row, column] = rows.item, rows.distance
        # In sorted rows [query, longest list] a repeated item stands next to itself; -1 may repeat.
        ids = self._catalogue.ids
        ordered = np.sort(items, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            row, column = np.argwhere(twice)[0]
            pair = f"query {ids[queries[row]]!r} and gallery item {ids[ordered[row, column]]!r}"
            raise BadInput(f"{self._source}: {pair} are paired twice; keep each pair once")
        # [query]: whether any distance in the list is smaller than the one before it.
        falls = (distances[:, 1:] < distances[:, :-1]).any(axis=1)
        if falls.any():
            raise BadInput(
                f"{self._source}: {self._value}s of query {ids[queries[falls.argmax()]]!r} "
                f"{'fall' if self._value == 'distance' else 'grow'} where the rank grows; {self._other_way}"
            )

    def _items(self, batch: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Item numbers of both columns [row], or what `ItemLookup` gives instead."""
        queries, gallery = (self._texts(batch[name], name) for name in _IDS)
        # A query mostly has its rows together, so one look-up per run of equal queries is enough.
        runs = pc.run_end_encode(queries)
        of_runs, item = self._lookup.items(runs.values, gallery)
        query = np.repeat(of_runs, np.diff(runs.run_ends.to_numpy(), prepend=0))
        self._empty.note((query == EMPTY) | (item == EMPTY), self._n_rows)
        return query.astype(np.int32), item.astype(np.int32)

    def _texts(self, column: pa.ChunkedArray, name: str) -> pa.Array:
        try:
            return as_texts(column, name)
        except BadInput as error:
            raise BadInput(f"{self._source}: {error}; ids are text") from error

    def _check_columns(self, names: Sequence[str]) -> str:
        """Name of the column that holds the values; all batches must have the same columns."""
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise BadInput(f"{self._source}: {names.count(repeated)} columns are called {repeated!r}; keep one of them")
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
    def _value(self) -> str:
        return "score" if "score" in (self._columns or ()) else "distance"

    @property
    def _other_way(self) -> str:
        """The fix for values that grow the wrong way."""
        if self._value == "score":
            return "if they are distances, call the column distance (in a TREC run write them negative)"
        return "if they are similarities, call the column score"

    @property
    def _is_bad(self) -> bool:
        """Whether a fault was found; later batches are then read only to count faults."""
        found = self._not_finite.count or self._empty.count or self._no_rank.count
        return bool(found) or self._lookup.has_unknown

    def _raise_if_bad(self) -> None:
        if self._not_finite.count:
            bad = self._not_finite
            raise BadInput(
                f"{self._source}: {bad.count} values of {self._value} are not finite, first in row {bad.first} "
                f"({bad.value!r}{_hint(bad.value)})"
            )
        if self._empty.count:
            found = f"{self._empty.count} rows without query_id or gallery_id, first row {self._empty.first}"
            raise BadInput(f"{self._source}: {found}")
        if self._no_rank.count:
            raise BadInput(f"{self._source}: some ranks are empty or no numbers; fill them or remove the column")
        self._lookup.raise_if_unknown(self._source)
        if self._order is not None and self._order.is_flat():
            logger.warning(
                "%s: ALL CANDIDATES OF A QUERY HAVE THE SAME %s, in (almost) every list: they stand in the order of "
                "their ids; write the values or add a rank column", self._source, self._value.upper(),
            )  # fmt: skip
        if self._order is not None and self._order.is_turned():
            turned = "distances fall" if self._value == "distance" else "scores grow"
            raise BadInput(
                f"{self._source}: the {turned} from the first row to the last in (almost) every list, or the query "
                f"itself is the worst candidate; {self._other_way}; if the name is right, write the best candidate of "
                "each query first or add a rank column"
            )
        if self._order is not None and (query := self._order.odd_one()) is not None:
            raise BadInput(
                f"{self._source}: from the first row to the last, the {self._value} of query "
                f"{self._catalogue.ids[query]!r} runs the other way than that of the others; distances must be small, "
                "and scores large, where photos are alike; if the values are right, write the best candidate of each "
                "query first or add a rank column"
            )
        if self._conversion is not None:
            self._conversion.check_range(self._source)


def _hint(value: Any) -> str:
    """Why a value may not be a finite float32."""
    text = str(value)
    if re.fullmatch(r"-?\d+,\d+", text):
        return "; write a decimal point"
    if re.fullmatch(r"-?3\.4028234?\d*e\+?38", text, flags=re.IGNORECASE):
        return ", which faiss writes for no neighbour, so its index -1 was looked up as an id; leave such rows out"
    return ""


def _in_own_pages(column: np.ndarray) -> np.ndarray:
    """A copy in memory pages of its own: they return to the system with the array, which allocators would not do."""
    pages = mmap.mmap(-1, max(column.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, column.dtype, len(column))
    copy[:] = column
    return copy


def _as_int32(ranks: np.ndarray) -> np.ndarray:
    """The ranks as int32 if all of them fit, else unchanged."""
    if not np.isfinite(ranks).all() or np.abs(ranks).max(initial=0) >= 1 << 31:
        return ranks
    integers = ranks.astype(np.int32)
    return integers if np.array_equal(integers, ranks) else ranks


def _is_ascending(keys: Sequence[np.ndarray]) -> bool:
    """Whether the rows are ordered by the keys, the first one first."""
    # Whether each row is smaller than the one before it: by the last key, then by the last two, and so on.
    falls = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in reversed(keys):
        falls = (key[1:] < key[:-1]) | ((key[1:] == key[:-1]) & falls)
    return not falls.any()
