"""Queries and gallery of a search: embeddings with what else the search needs to know, in memory or by name of file."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from distributed_rerank.data.vectors import StoredVectors
from distributed_rerank.tensors.cells import Cells


@dataclass(frozen=True)
class SearchSide:
    """Queries or gallery items with what the search needs to know about them."""

    embeddings: Float32[np.ndarray, "item dim"]
    items: Int64[np.ndarray, " item"]
    sequences: Int64[np.ndarray, " item"]
    """-1 = none."""
    cells: Cells | None = None
    """Of a gallery that is searched in part, and ordered for it."""

    def part(self, start: int, stop: int) -> "SearchSide":
        """The rows start to stop."""
        return SearchSide(self.embeddings[start:stop], self.items[start:stop], self.sequences[start:stop])

    cut = part


@dataclass(frozen=True)
class StoredSide:
    """A `SearchSide` of which a part is made when it is asked for: beside the embeddings' file it is numbers."""

    embeddings: StoredVectors | np.ndarray
    items: Int[np.ndarray, " item"] | range
    rows_of: Int32[np.ndarray, " _"] | range
    """The row of each item of the catalogue in `embeddings`."""
    sequences_of: Int32[np.ndarray, " _"]
    """The sequence of each item of the catalogue; -1 = none."""
    cells: Cells | None = None
    """As in `SearchSide`."""

    def chosen(self, rows: Int64[np.ndarray, " row"]) -> "StoredSide":
        """These rows, in the order given."""
        return replace(self, items=np.asarray(self.items, np.int32)[rows])

    def part(self, start: int, stop: int) -> SearchSide:
        """The rows start to stop, in memory."""
        rows, items, sequences = self._numbers(start, stop)
        return SearchSide(self.embeddings[rows], items, sequences)

    def cut(self, start: int, stop: int) -> "SearchSide | Cut":
        """The rows start to stop to send to who reads them: without embeddings, where these lie in a file."""
        if isinstance(self.embeddings, np.ndarray):
            return self.part(start, stop)
        return Cut(self.embeddings, *self._numbers(start, stop))

    def _numbers(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows in `embeddings`, items and sequences of the rows start to stop."""
        items = np.asarray(self.items[start:stop], np.int64)
        rows = items.astype(np.int32) if isinstance(self.rows_of, range) else self.rows_of[items]
        return rows, items, self.sequences_of[items].astype(np.int64)


@dataclass(frozen=True)
class Cut:
    """Rows of a `StoredSide` by name of file and number."""

    embeddings: StoredVectors
    rows: Int32[np.ndarray, " item"]
    items: Int64[np.ndarray, " item"]
    sequences: Int64[np.ndarray, " item"]

    def read(self) -> SearchSide:
        """The same in memory; only where the file is."""
        return SearchSide(self.embeddings[self.rows], self.items, self.sequences)


Side = SearchSide | StoredSide
