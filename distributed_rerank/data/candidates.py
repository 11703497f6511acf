"""Candidate lists and pair distances between their tables (ids) and their tensors (item numbers)."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32
from torch import Tensor

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.csv_files import regrouped
from distributed_rerank.data.texts import Texts
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists, places_of

_PAIRS, _MOST_PAIRS = 1 << 16, 1 << 20
"""Logits that are placed at a time: as many as the catalogue has items, within these bounds. A look-up of many ids
passes over the whole catalogue, so fewer at a time would cost pairs times items."""


def candidates_table(lists: CandidateLists, ids: Texts) -> pa.Table:
    """The candidates table of these lists, in their order; `ids` are the catalogue's. Ranks count from 1."""
    queries, items, distances = lists.arrays()
    filled = items >= 0
    assert not (filled[:, 1:] & ~filled[:, :-1]).any(), "a candidate list has a gap"
    rows, columns = np.nonzero(filled)
    return pa.table(
        {
            "query_id": ids.take(queries[rows]),
            "gallery_id": ids.take(items[filled]),
            "rank": pa.array(columns + 1, pa.int32()),
            "distance": pa.array(distances[filled], pa.float32()),
        }
    )


def pairs_table(lists: CandidateLists, logits: Float32[Tensor, "query k"], ids: Texts) -> pa.Table:
    """The pair distances table of the pairs with a finite logit, list by list; `ids` are the catalogue's."""
    queries, items, _ = lists.arrays()
    rows, columns = np.nonzero(logits.isfinite().numpy())
    pairs = {
        "query_id": ids.take(queries[rows]),
        "gallery_id": ids.take(items[rows, columns]),
        "logit": logits.numpy()[rows, columns],
    }
    return tables.conform(pa.table(pairs), "pair_distances")


def aligned_logits(
    tables_of_pairs: Iterable[pa.Table], catalogue: Catalogue, lists: CandidateLists
) -> Float32[Tensor, "query k"]:
    """Logits of pair distances tables, one in memory at a time, at the places of `lists`; NaN where no pair was scored.

    Pairs that are in no list are left out. Raises BadInput for a pair of a list with two logits and for unknown ids.
    """
    n, width = len(catalogue) + 1, lists.items.shape[1]
    logits = torch.full(lists.items.shape, torch.nan)
    query_items, by_query = lists.query_items.sort()
    for pairs in regrouped(tables_of_pairs, min(max(_PAIRS, n), _MOST_PAIRS)):
        queries, gallery = (torch.from_numpy(catalogue.items_of(pairs[name])) for name in ("query_id", "gallery_id"))
        rows = places_of(query_items, queries.unique())
        rows = by_query[rows[rows >= 0]]
        # [list of these queries, k]: one number for each place, and sorted; item -1 has the number of no pair.
        keys, order = (lists.query_items[rows][:, None] * n + lists.items[rows] + 1).flatten().sort()
        found = places_of(keys, queries * n + gallery + 1)
        places = order[found[found >= 0]]
        row, column = rows[places // max(width, 1)], places % max(width, 1)
        if len(places.unique()) < len(places) or bool(logits[row, column].isfinite().any()):
            raise BadInput("a pair has two logits; give each (query_id, gallery_id) once")
        logits[row, column] = torch.tensor(pairs["logit"].to_numpy())[found >= 0]
    return logits
