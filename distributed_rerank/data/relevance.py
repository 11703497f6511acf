"""How many gallery items are relevant to each query, from the catalogue alone, before any image is read."""

import numpy as np
import torch
from jaxtyping import Bool, Int64

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.pair_values import PairValues

_GALLERY_PER_BLOCK = 1 << 16
"""Items whose gallery items are counted at a time, as long as they are more than the queries."""


def count_relevant(catalogue: Catalogue) -> Int64[np.ndarray, " query"]:
    """Gallery items of each query's label, without itself and its own sequence; queries in item order.

    Where the catalogue has judgements, those with a grade above 0.
    """
    if catalogue.judgements is not None:
        return count_judged(catalogue)[catalogue.query_items]
    queries, labels, sequences = catalogue.query_items, catalogue.labels, catalogue.sequences
    n_sequences = int(sequences.max(initial=-1)) + 1

    def pairs(items: np.ndarray) -> np.ndarray:
        return labels[items].astype(np.int64) * n_sequences + sequences[items]

    same_label, in_sequence = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    # The gallery some items at a time: sorting it at once would need many times its memory.
    for part in catalogue.gallery_blocks(max(_GALLERY_PER_BLOCK, len(queries))):
        same_label += _count(labels[part], labels[queries])
        in_sequence += _count(pairs(part[sequences[part] >= 0]), pairs(queries))
    # Of these, the items of the query's own sequence; the query itself is one of them where it has a sequence.
    own = np.where(sequences[queries] >= 0, in_sequence, _are_gallery(catalogue, queries))
    return np.where(labels[queries] >= 0, same_label - own, 0)


def count_judged(catalogue: Catalogue) -> Int64[np.ndarray, " item"]:
    """Gallery items with a grade above 0 for each item, without itself and its own sequence; 0 for others."""
    assert catalogue.judgements is not None, "the catalogue has no judgements"
    queries, candidates, grades = catalogue.judgements.pairs(catalogue.ids)
    sequences = catalogue.sequences
    is_own = (queries == candidates) | ((sequences[queries] >= 0) & (sequences[queries] == sequences[candidates]))
    return np.bincount(queries[(grades > 0) & catalogue.is_gallery[candidates] & ~is_own], minlength=len(catalogue))


def are_relevant(catalogue: Catalogue, query_item: int, items: Int64[np.ndarray, " item"]) -> Bool[np.ndarray, " item"]:
    """Whether each of these items answers the query: by the judgements where there are some, else by the labels."""
    if catalogue.judgements is None:
        return catalogue.labels[items] == catalogue.labels[query_item]
    queries, candidates, grades = catalogue.judgements.pairs(catalogue.ids)
    return np.isin(items, candidates[(queries == query_item) & (grades > 0)])


def check_measurable(catalogue: Catalogue) -> None:
    """Raises BadInput, with the cause, where no query has a relevant gallery item."""
    queries = catalogue.query_items
    for role, number in (("is_query", len(queries)), ("is_gallery", catalogue.n_gallery)):
        if not number:
            raise BadInput(f"{catalogue.source}: no row of this split has {role}; set it or choose another --split")
    if count_relevant(catalogue).any():
        return
    if catalogue.judgements is not None:
        raise BadInput(
            f"{catalogue.source}: no judged query has a relevant gallery item; check --judgements and --split"
        )
    labels = catalogue.labels
    others = _count(labels[catalogue.is_gallery], labels[queries]) - _are_gallery(catalogue, queries)
    n_hidden = int((others[labels[queries] >= 0] > 0).sum())
    cause = f"{len(queries) - n_hidden} have no other gallery item of their label; check label and is_gallery"
    if n_hidden == len(queries):
        cause = "all gallery items of a query's label are of its own sequence; check sequence and is_gallery"
    elif n_hidden:
        cause = f"{n_hidden} have such items in their own sequence alone, {cause}, and sequence"
    raise BadInput(
        f"{catalogue.source}: none of the {len(queries)} queries has a relevant gallery item, so nothing can be "
        f"measured: {cause}"
    )


def _are_gallery(catalogue: Catalogue, items: np.ndarray) -> np.ndarray:
    return catalogue.is_gallery[items]


def _count(of: np.ndarray, wanted: np.ndarray) -> Int64[np.ndarray, " wanted"]:
    """How often each wanted number is in `of`."""
    values, counts = np.unique(of, return_counts=True)
    if not len(values):
        return np.zeros(len(wanted), np.int64)
    places = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    return np.where(values[places] == wanted, counts[places], 0).astype(np.int64)


def judged_pairs(catalogue: Catalogue) -> PairValues | None:
    """The grades of the catalogue's judgements by pairs of items."""
    if catalogue.judgements is None:
        return None
    queries, candidates, grades = map(torch.from_numpy, map(np.array, catalogue.judgements.pairs(catalogue.ids)))
    keys, order = (queries * len(catalogue) + candidates).sort()
    return PairValues(keys, grades[order], len(catalogue))


def without_junk(lists: CandidateLists, catalogue: Catalogue) -> CandidateLists:
    """The lists without candidates that are judged to count as neither relevant nor not (a grade below 0)."""
    judged = judged_pairs(catalogue)
    if judged is None or not bool((judged.values < 0).any()):
        return lists
    return lists.without(judged.look_up(lists.query_items[:, None].expand_as(lists.items), lists.items) < 0)[0]
