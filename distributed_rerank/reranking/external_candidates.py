"""First-stage lists that another system made, cleaned of what no search returns. Layer 3."""

import logging
from collections.abc import Set
from pathlib import Path

import numpy as np

from distributed_rerank.config.evaluation import MissingLists
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_checks import some
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
    if not lists.items.size:
        raise BadInput(f"{path}: no list of a readable query is left; give lists with at least one row")
    n_gone = drop_unusable(lists, catalogue)
    if n_gone:
        logger.warning(
            "%s: %d candidates are left out (the query itself, its sequence, or not is_gallery)", path, n_gone
        )
    n_empty = int((lists.items[:, 0] < 0).sum())
    if n_empty:
        logger.warning("%s: nothing is left of the lists of %d queries, they count as misses", path, n_empty)
    return lists


def settle_missing_lists(
    catalogue: Catalogue, lists: CandidateLists, missing: MissingLists, path: Path
) -> tuple[Catalogue, int]:
    """The catalogue with the queries that count, and how many of its queries have no list in the file `path`.

    `missing` says what becomes of these: "error" raises BadInput, with "miss" they stay queries, which find nothing,
    with "leave_out" they are no longer queries. A list of which nothing is left is a list.
    """
    lost = np.setdiff1d(catalogue.query_items, lists.query_items)
    if not len(lost):
        return catalogue, 0
    found = f"{path}: {len(lost)} of {len(catalogue.query_items)} queries have no list: "
    if missing == "error":
        raise BadInput(
            f"{found}{some(catalogue.ids[lost].tolist())}; add their lists, or say what they count as with "
            "--missing-lists miss or --missing-lists leave_out"
        )
    if missing == "miss":
        logger.info("%sthey find nothing", found)
        return catalogue, len(lost)
    logger.info("%sthey are left out", found)
    is_query = np.zeros(len(catalogue), bool)
    is_query[lists.query_items] = True
    return Catalogue(catalogue.table.assign(is_query=is_query), catalogue.source), len(lost)


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
