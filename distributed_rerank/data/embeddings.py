"""Embeddings by id, as a folder or table holds them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int64

from distributed_rerank.data import manifests, tables
from distributed_rerank.data.files import json_digest
from distributed_rerank.data.rejects import Reject, rejects_of


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings by id, ids ascending, and the images that have none because they cannot be read."""

    ids: np.ndarray
    matrix: Float32[np.ndarray, "image dim"]
    rejects: tuple[Reject, ...] = ()

    def rows_of(self, ids: np.ndarray) -> Int64[np.ndarray, " id"]:
        """The row of each id; -1 where there is none."""
        return self._index.get_indexer(pd.Index(ids, dtype=object)).astype(np.int64)

    def rejects_among(self, ids: np.ndarray) -> list[Reject]:
        """The rejected images among these."""
        own = set(ids)
        return [reject for reject in self.rejects if reject.id in own]

    @cached_property
    def digest(self) -> str:
        """sha256 of ids and values."""
        total = hashlib.sha256(json_digest(self.ids.tolist()).encode())
        total.update(np.ascontiguousarray(self.matrix).data)
        return total.hexdigest()

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.ids, dtype=object)


def read_embeddings(folder: str | Path) -> Embeddings:
    """What the embedding stage wrote to `folder`, or any embeddings table (then nothing is known to be rejected).

    Raises BadInput for a file of a finished folder that is gone or has changed, and as `tables.read_embeddings` does.
    """
    ids, matrix = tables.read_embeddings(folder)
    manifests.check_files(folder, ["rejects.parquet"])
    rejects = Path(folder) / "rejects.parquet"
    known = rejects_of(tables.read_table(rejects, "rejects")) if rejects.is_file() else []
    order = np.argsort(ids, kind="stable")
    return Embeddings(ids[order], matrix[order], tuple(known))


def join_embeddings(parts: Sequence[Embeddings | None]) -> Embeddings:
    """All parts as one, sorted by id; an image rejected first and embedded later counts as embedded."""
    present = [part for part in parts if part is not None]
    if not present:
        return Embeddings(np.empty(0, dtype=object), np.empty((0, 1), np.float32))
    ids = np.concatenate([part.ids for part in present])
    filled = [part.matrix for part in present if len(part.ids)]
    matrix = np.concatenate(filled) if filled else present[0].matrix
    order = np.argsort(ids, kind="stable")
    embedded = set(ids)
    rejects = {reject.id: reject for part in present for reject in part.rejects if reject.id not in embedded}
    return Embeddings(ids[order], matrix[order], tuple(rejects[id] for id in sorted(rejects)))
