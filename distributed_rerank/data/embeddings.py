"""Embeddings by id, as a folder or table holds them.

Those that `embed` wrote stay on disk, and their ids with them: only the rows that are asked for are read.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

from distributed_rerank.data import tables
from distributed_rerank.data.csv_files import regrouped
from distributed_rerank.data.rejects import Reject, rejects_of
from distributed_rerank.data.texts import Texts, json_of_parts, parts_of
from distributed_rerank.data.vectors import ROWS_PER_GROUP, StoredVectors, stored_vectors, write_vectors
from distributed_rerank.storage import manifests, paths
from distributed_rerank.storage.files import text_digest
from distributed_rerank.tensors import sharding

logger = logging.getLogger(__name__)


class Embeddings:
    """Embeddings by id, ids ascending, and the images that have none because they cannot be read."""

    def __init__(self, ids: Any, matrix: np.ndarray | StoredVectors, rejects: tuple[Reject, ...] = ()) -> None:
        """`ids`: a column of texts, None where the `matrix` is on disk and has them."""
        self._ids = None if ids is None else Texts(ids)
        self.matrix = matrix
        """Embeddings [image, dim]: an array, or what gives the rows that are asked for as one."""
        self.rejects = rejects

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def ids(self) -> Texts:
        """All ids."""
        return Texts(pa.chunked_array(self.id_parts(), pa.large_string())) if self._ids is None else self._ids

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self.matrix.shape[1]

    def id_parts(self) -> Iterator[pa.Array]:
        """The ids, some at a time."""
        return self.matrix.id_parts() if isinstance(self.matrix, StoredVectors) else parts_of(self.ids.column)

    def blocks(self) -> Iterator[Float32[np.ndarray, "image dim"]]:
        """The embeddings in their order, some at a time."""
        return (self.matrix[start:stop] for start, stop in sharding.blocks(len(self), ROWS_PER_GROUP))

    def tables(self) -> Iterator[pa.Table]:
        """Ids and embeddings, some at a time."""
        start = 0
        for ids in self.id_parts():
            yield tables.embeddings_table(ids, self.matrix[start : start + len(ids)])
            start += len(ids)

    def rows_of(self, ids: Texts) -> Int32[np.ndarray, " id"]:
        """The row of each of these ids, which must ascend; -1 where there is none."""
        rows = np.full(len(ids), -1, np.int32)
        start = 0
        for part in self.id_parts():
            places = ids.places_of(part)
            rows[places[places >= 0]] = np.flatnonzero(places >= 0) + start
            start += len(part)
        return rows

    def rows_of_all(self, ids: Texts) -> Int32[np.ndarray, " id"] | range:
        """`rows_of`, as a range where it is one, as mostly: an array of all images is not kept then."""
        rows = self.rows_of(ids)
        return range(len(rows)) if len(rows) == len(self) and rows.min(initial=0) >= 0 else rows

    def rejects_among(self, ids: Texts) -> list[Reject]:
        """The rejected images among these ids, which must ascend."""
        is_own = ids.places_of([reject.id for reject in self.rejects]) >= 0
        return [reject for reject, is_one in zip(self.rejects, is_own, strict=True) if is_one]

    def mapped(self, function: Callable[[np.ndarray], Float32[np.ndarray, "image dim"]], path: Path) -> "Embeddings":
        """`function` of the embeddings, some at a time, written to the file `path`; the rejects are the same."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = regrouped(self.tables(), ROWS_PER_GROUP)
        parts = (tables.embeddings_table(part["id"], function(tables.matrix_of(part).copy())) for part in whole)
        write_vectors(path, function(self.matrix[:0]).shape[1], parts)
        return Embeddings(None, _stored(path), self.rejects)

    @cached_property
    def digest(self) -> str:
        """sha256 of ids and values."""
        total = hashlib.sha256(text_digest(json_of_parts(self.id_parts())).encode())
        for block in self.blocks():
            total.update(np.ascontiguousarray(block).data)
        return total.hexdigest()


def read_embeddings(folder: str | Path) -> Embeddings:
    """What the embedding stage wrote to `folder`, or any embeddings table (then nothing is known to be rejected).

    A table of another program is read into memory and sorted by id, and so is one that it has put in the place of ours.
    Raises BadInput for a file of a finished folder that is gone or has changed, and as `tables.read_embeddings` does.
    """
    is_local = paths.scheme_of(str(folder)) is None
    if is_local and tables.is_rewritten(Path(folder)):
        logger.warning(
            "%s: another program has written the embeddings anew after embed; they are used as they are", folder
        )
    stored = stored_vectors(tables.files_of(Path(folder), "embeddings")) if is_local else None
    manifests.check_files(folder, ["rejects.parquet"])
    rejects = Path(folder) / "rejects.parquet"
    known = tuple(rejects_of(tables.read_table(rejects, "rejects")) if rejects.is_file() else [])
    if stored is not None:
        return Embeddings(None, stored, known)
    ids, matrix = tables.read_embeddings(folder)
    order = np.argsort(ids, kind="stable")
    return Embeddings(ids[order], matrix[order], known)


def _stored(path: Path) -> StoredVectors:
    found = stored_vectors([path])
    assert found is not None, f"{path} is not as it was written"
    return found
