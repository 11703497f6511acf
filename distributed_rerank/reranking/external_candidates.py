"""First-stage lists that another system made, without candidates that no search of ours would return."""

import logging
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

import numpy as np

from distributed_rerank.config.choices import MissingLists
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_checks import some
from distributed_rerank.data.distance_kinds import Conversion
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists

logger = logging.getLogger(__name__)

QUERIES_PER_BLOCK = 1 << 14


def external_candidates(
    catalogue: Catalogue, path: Path, rejected: Set[str], conversion: Conversion | None = None
) -> CandidateLists:
    """The lists in the file or folder `path`, without rejects and without what `drop_unusable` removes.

    Their values become L2 distances by `conversion`; None = they stay as they are, small = same.
    Raises BadInput for a query that is not marked as one, for lists of rejects only, and as `read_candidates` does.
    """
    lists = read_candidates(path, catalogue, ignored=rejected, conversion=conversion)
    query_items = lists.query_items.numpy()
    is_query = np.isin(query_items, catalogue.query_items)
    if not is_query.all():
        name = catalogue.ids[query_items[~is_query][0]]
        raise BadInput(
            f"{path}: {(~is_query).sum()} queries are not marked is_query in the catalogue, first {name!r}; "
            "mark them or remove their rows"
        )
    if not len(lists):
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
    lost = np.setdiff1d(catalogue.query_items, lists.query_items.numpy())
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
    is_query[lists.query_items.numpy()] = True
    return replace(catalogue, table=catalogue.table.assign(is_query=is_query)), len(lost)


def drop_unusable(lists: CandidateLists, catalogue: Catalogue) -> int:
    """Remove each query itself, its sequence and what is no gallery item from the lists, in place; their number.

    Candidates behind a removed one move up.
    """
    is_gallery, sequences, n_gone = tensor_of(catalogue.is_gallery), tensor_of(catalogue.sequences), 0
    for start, stop in sharding.blocks(len(lists), QUERIES_PER_BLOCK):
        part = lists[start:stop]
        # [query, k]: an item -1 takes the last entry of either table; `is_there` leaves it out again.
        own, is_there = sequences[part.query_items][:, None], part.items >= 0
        is_same = (part.items == part.query_items[:, None]) | ((own >= 0) & (sequences[part.items] == own))
        is_gone = is_there & (is_same | ~is_gallery[part.items])
        if bool(is_gone.any()):
            n_gone += int(is_gone.sum())
            left, _ = part.without(is_gone)
            part.items.copy_(left.items)
            part.distances.copy_(left.distances)
    return n_gone
