"""Candidate lists and pair distances between their files (ids) and their arrays (item numbers) (layer 2)."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput


class CandidateLists(NamedTuple):
    """Candidates of each query, best first, as items of one catalogue; shorter lists end in -1 and inf."""

    query_items: Int64[np.ndarray, " query"]
    items: Int64[np.ndarray, "query k"]
    distances: Float32[np.ndarray, "query k"]


def candidates_table(lists: CandidateLists, ids: np.ndarray) -> pa.Table:
    """The candidates table of these lists, in their order; `ids` are the catalogue's. Ranks count from 1."""
    filled = lists.items >= 0
    assert not (filled[:, 1:] & ~filled[:, :-1]).any(), "a candidate list has a gap"
    rows, columns = np.nonzero(filled)
    return pa.table(
        {
            "query_id": pa.array(ids[lists.query_items], pa.string()).take(pa.array(rows)),
            "gallery_id": pa.array(ids[lists.items[filled]], pa.string()),
            "rank": pa.array(columns + 1, pa.int32()),
            "distance": pa.array(lists.distances[filled], pa.float32()),
        }
    )


def pairs_table(query_ids: np.ndarray, gallery_ids: np.ndarray, logits: np.ndarray) -> pa.Table:
    """The pair distances table of scored pairs, in the order given."""
    columns = {"query_id": query_ids, "gallery_id": gallery_ids, "logit": np.asarray(logits, np.float32)}
    return tables.conform(pa.table(columns), "pair_distances")


def aligned_logits(pairs: pa.Table, catalogue: Catalogue, lists: CandidateLists) -> Float32[np.ndarray, "query k"]:
    """Logits of a pair distances table at the places of `lists`; NaN where a pair was not scored.

    Pairs that are in no list are left out. Raises BadInput for a pair with two logits and for unknown ids.
    """
    n = len(catalogue)
    keys = catalogue.items_of(pairs["query_id"].to_numpy()) * n + catalogue.items_of(pairs["gallery_id"].to_numpy())
    order = np.argsort(keys, kind="stable")
    keys, logits = keys[order], pairs["logit"].to_numpy()[order]
    if len(keys) and (keys[1:] == keys[:-1]).any():
        raise BadInput("a pair has two logits; give each (query_id, gallery_id) once")
    wanted = lists.query_items[:, None] * n + lists.items
    place = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
    found = (lists.items >= 0) & (keys[place] == wanted) if len(keys) else np.zeros(wanted.shape, bool)
    result = np.full(wanted.shape, np.nan, np.float32)
    result[found] = logits[place[found]]
    return result
