"""First-stage lists that another system made, cleaned of what no search returns. Layer 3."""

import logging
from collections.abc import Set
from pathlib import Path

import numpy as np

from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import sharding

logger = logging.getLogger(__name__)

QUERIES_PER_BLOCK = 1 << 14


def external_candidates(catalogue: Catalogue, path: Path, rejected: Set[str]) -> CandidateLists:
    """The lists in the file or folder `path`, without rejects, the query itself, its sequence, and what is no gallery
    item; what stood behind these moves up.

    Raises BadInput for a query that is not marked as one, for lists of rejects only, and as `read_candidates` does.
    """
    lists = read_candidates(path, catalogue, ignored=rejected)
    is_query = np.isin(lists.query_items, catalogue.query_items)
    if not is_query.all():
        name = catalogue.ids[lists.query_items[~is_query][0]]
        raise BadInput(
            f"{path}: {(~is_query).sum()} queries are not marked is_query in the catalogue, first {name!r}; "
            "mark them or remove their rows"
        )
    if not len(lists.query_items):
        raise BadInput(f"{path}: no list of a readable query is left; give lists with at least one row")
    n_gone = drop_unusable(lists, catalogue)
    if n_gone:
        logger.warning(
            "%s: %d candidates are left out (the query itself, its sequence, or not is_gallery)", path, n_gone
        )
    return lists


def drop_unusable(lists: CandidateLists, catalogue: Catalogue) -> int:
    """Remove from the lists, in place, each query itself, its sequence and what is no gallery item; their number."""
    is_gallery = np.zeros(len(catalogue), bool)
    is_gallery[catalogue.gallery_items] = True
    sequences, n_gone = catalogue.sequences, 0
    for start, stop in sharding.blocks(len(lists.query_items), QUERIES_PER_BLOCK):
        queries, items, distances = (array[start:stop] for array in lists)
        own = sequences[queries][:, None]
        same = (items == queries[:, None]) | ((own >= 0) & (sequences[items] == own))
        gone = (items >= 0) & (same | ~is_gallery[items])
        if not gone.any():
            continue
        n_gone += int(gone.sum())
        is_empty = gone | (items < 0)
        order = np.argsort(is_empty, axis=1, kind="stable")
        items[:] = np.take_along_axis(np.where(is_empty, -1, items), order, axis=1)
        distances[:] = np.take_along_axis(np.where(is_empty, np.float32(np.inf), distances), order, axis=1)
    return n_gone
