"""Notice candidate lists whose values are named the wrong way round: similarities called distance, or the reverse."""

import numpy as np
from jaxtyping import Float32, Int32

_MOST = 0.9
"""Share of the lists that must agree: some lists of a shuffled file fall by chance, nine of ten do not."""
_LONG = 5
"""A list of so many values is in order by chance once in 60 times."""


class ListOrder:
    """Watches lists without ranks as their rows come in; says whether their values fall where they should grow.

    The pair of a query with itself decides where lists have it: its value should be the smallest. Otherwise the order
    of the rows decides, for almost every system writes the best candidate first.
    """

    def __init__(self, n_items: int) -> None:
        # [item]: of the list of each query, the last value so far, whether any value is above or below the one before
        # it, the value of the query with itself, and the smallest and largest of its other values.
        self._last = np.full(n_items, np.nan, np.float32)
        self._rises, self._falls = np.zeros(n_items, bool), np.zeros(n_items, bool)
        self._n_values = np.zeros(n_items, np.int32)
        self._own = np.full(n_items, np.nan, np.float32)
        self._low, self._high = np.full(n_items, np.nan, np.float32), np.full(n_items, np.nan, np.float32)

    def add(
        self, query: Int32[np.ndarray, " row"], item: Int32[np.ndarray, " row"], value: Float32[np.ndarray, " row"]
    ) -> None:
        """Rows in the order of their query items, and of one query in the order of the file; small values are best."""
        if not len(query):
            return
        is_first = np.ones(len(query), bool)
        is_first[1:] = query[1:] != query[:-1]
        starts = np.flatnonzero(is_first)
        ends = np.append(starts[1:], len(query)) - 1
        # Each row against the one before it in its list; the first against the last of an earlier batch, or NaN.
        before = np.empty_like(value)
        before[1:] = value[:-1]
        before[starts] = self._last[query[starts]]
        self._rises[query[value > before]] = True
        self._falls[query[value < before]] = True
        self._last[query[ends]] = value[ends]
        self._n_values[query[starts]] += (ends - starts + 1).astype(np.int32)
        is_own = item == query
        self._own[query[is_own]] = value[is_own]
        others = np.where(is_own, np.float32(np.nan), value)
        found = query[starts]
        self._low[found] = np.fmin(self._low[found], np.fmin.reduceat(others, starts))
        self._high[found] = np.fmax(self._high[found], np.fmax.reduceat(others, starts))

    def odd_one(self) -> int | None:
        """The query of a list that falls in a file where the other lists grow, or the reverse; None where all agree.

        Only files count in which almost every long list is in one of both orders, so shuffled ones do not.
        """
        is_long = self._n_values >= _LONG
        grow, fall = is_long & self._rises & ~self._falls, is_long & self._falls & ~self._rises
        n_grow, n_fall = int(grow.sum()), int(fall.sum())
        if min(n_grow, n_fall) == 0 or n_grow + n_fall < _MOST * is_long.sum():
            return None
        return int(np.argmax(fall if n_fall <= n_grow else grow))

    def is_flat(self) -> bool:
        """Whether most lists of some length have one value alone, so that the values order nothing."""
        is_long = self._n_values >= _LONG
        return bool(is_long.any() and (self._low == self._high)[is_long].mean() >= _MOST)

    def is_turned(self) -> bool:
        """Whether the values of most lists are largest where the best candidate is."""
        has_own = np.isfinite(self._own) & np.isfinite(self._high)
        if has_own.any():
            is_largest = self._own[has_own] > self._high[has_own]
            return bool(is_largest.mean() >= _MOST)
        varies, only_falls = self._rises | self._falls, self._falls & ~self._rises
        return bool(varies.any() and only_falls.sum() >= _MOST * varies.sum())
