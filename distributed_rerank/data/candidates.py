"""Candidate lists and pair distances between their tables (ids) and their tensors (item numbers)."""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32
from torch import Tensor

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists, places_of


def candidates_table(lists: CandidateLists, ids: np.ndarray) -> pa.Table:
    """The candidates table of these lists, in their order; `ids` are the catalogue's. Ranks count from 1."""
    queries, items, distances = lists.arrays()
    filled = items >= 0
    assert not (filled[:, 1:] & ~filled[:, :-1]).any(), "a candidate list has a gap"
    rows, columns = np.nonzero(filled)
    return pa.table(
        {
            "query_id": pa.array(ids[queries], pa.string()).take(pa.array(rows)),
            "gallery_id": pa.array(ids[items[filled]], pa.string()),
            "rank": pa.array(columns + 1, pa.int32()),
            "distance": pa.array(distances[filled], pa.float32()),
        }
    )


def pairs_table(lists: CandidateLists, logits: Float32[Tensor, "query k"], ids: np.ndarray) -> pa.Table:
    """The pair distances table of the pairs with a finite logit, list by list; `ids` are the catalogue's."""
    queries, items, _ = lists.arrays()
    rows, columns = np.nonzero(logits.isfinite().numpy())
    pairs = {
        "query_id": ids[queries[rows]],
        "gallery_id": ids[items[rows, columns]],
        "logit": logits.numpy()[rows, columns],
    }
    return tables.conform(pa.table(pairs), "pair_distances")


def aligned_logits(pairs: pa.Table, catalogue: Catalogue, lists: CandidateLists) -> Float32[Tensor, "query k"]:
    """Logits of a pair distances table at the places of `lists`; NaN where a pair was not scored.

    Pairs that are in no list are left out. Raises BadInput for a pair with two logits and for unknown ids.
    """
    n = len(catalogue)
    # One number for each scored pair, ascending, and for each place of the lists.
    queries, gallery = (catalogue.items_of(pairs[name].to_numpy()) for name in ("query_id", "gallery_id"))
    keys, order = torch.from_numpy(queries * n + gallery).sort(stable=True)
    if bool((keys.diff() == 0).any()):
        raise BadInput("a pair has two logits; give each (query_id, gallery_id) once")
    places = places_of(keys, lists.query_items[:, None] * n + lists.items)
    places = torch.where(lists.items >= 0, places, -1)
    # The last logit belongs to place -1.
    logits = torch.from_numpy(np.append(pairs["logit"].to_numpy()[order.numpy()], np.float32(np.nan)))
    return logits[places]
