"""Training lists drawn from the candidate lists of a whole training set, the same kind of list that is re-ranked later.

An anchor is a query of the candidate lists; `labels` and `sequences` are indexed by item number, -1 = none. A candidate
without a label is neither positive nor negative. The filters against false negatives are those of
sentence-transformers' `mine_hard_negatives`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from distributed_rerank.config.training import NegativeFilters
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.ragged import offsets_of

_ANCHORS = 1024
"""So many are compared with their candidates at a time."""


@dataclass(frozen=True)
class TrainingLists:
    """Lists to train on, at most one per anchor: its positive and its negatives."""

    rows: Int64[Tensor, " list"]
    """The anchor, as a row of the candidate lists."""
    items: Int64[Tensor, "list candidate"]
    """Column 0 is the positive, the others are negatives."""
    is_beyond: Bool[Tensor, " list"]
    """Whether the positive is not in the anchor's candidate list."""


def are_positive(lists: CandidateLists, labels: Int64[Tensor, " item"]) -> Bool[Tensor, "query k"]:
    """Whether each candidate has its anchor's label; False for missing candidates and where either has no label."""
    anchor_labels = labels[lists.query_items][:, None]
    return (_labels_of(lists, labels) == anchor_labels) & (anchor_labels >= 0)


def are_negative(lists: CandidateLists, labels: Int64[Tensor, " item"]) -> Bool[Tensor, "query k"]:
    """Whether each candidate has another label than its anchor; False where either has no label."""
    anchor_labels = labels[lists.query_items][:, None]
    candidate_labels = _labels_of(lists, labels)
    return (candidate_labels != anchor_labels) & (candidate_labels >= 0) & (anchor_labels >= 0)


def filter_negatives(
    lists: CandidateLists,
    labels: Int64[Tensor, " item"],
    filters: NegativeFilters,
    embeddings: Float[Tensor, "item dim"] | None = None,
    sequences: Int64[Tensor, " item"] | None = None,
) -> tuple[Bool[Tensor, "query k"], dict[str, int]]:
    """The negatives that pass all filters, and how many each filter dropped (each counts once).

    Margins need `embeddings`: they are in cosine similarity, and refer to the least similar of all positives of the
    anchor, in its list or not, those of its own sequence left out. An anchor without any keeps its negatives.
    """
    allowed = are_negative(lists, labels)
    # [query, k]: what each filter by nearness drops.
    too_near: dict[str, Tensor] = {}
    if filters.absolute_margin is not None or filters.relative_margin is not None:
        assert embeddings is not None, "margins are in similarity, which distances alone do not tell"
        similarity, least = _similarities(lists, labels, embeddings, sequences)
        if filters.absolute_margin is not None:
            too_near["absolute_margin"] = similarity + filters.absolute_margin > least
        if filters.relative_margin is not None:
            too_near["relative_margin"] = similarity > least - filters.relative_margin * least.abs()
    if filters.min_distance is not None:
        too_near["min_distance"] = lists.distances < filters.min_distance
    dropped: dict[str, int] = {}
    for name, is_dropped in too_near.items():
        dropped[name] = int((allowed & is_dropped).sum())
        allowed = allowed & ~is_dropped
    # Filters by rank [query, k], counted from 0 among the negatives that are left.
    rank = allowed.cumsum(dim=1) - 1
    too_early = allowed & (rank < filters.range_min)
    too_late = allowed & (rank >= (allowed.shape[1] if filters.range_max is None else filters.range_max))
    dropped |= {"range_min": int(too_early.sum()), "range_max": int(too_late.sum())}
    return allowed & ~too_early & ~too_late, dropped


def draw_lists(
    lists: CandidateLists,
    labels: Int64[Tensor, " item"],
    allowed: Bool[Tensor, "query k"],
    *,
    n_negatives: int,
    generator: torch.Generator,
    beyond_share: float = 0.0,
    temperature: float | None = None,
    sequences: Int64[Tensor, " item"] | None = None,
) -> TrainingLists:
    """One list "1 positive + n negatives" for every anchor that has both; other anchors are left out.

    The positive is drawn uniformly from those in the candidate list or, for a random `beyond_share` of the anchors,
    from those beyond it (not in the list, not in the anchor's sequence). An anchor with only one of the two kinds takes
    that one. The negatives are drawn without replacement from `allowed`, all with the same chance or, with a
    temperature, in proportion to exp(-distance / temperature) (Gumbel top-k, Kool et al. 2019). An anchor with fewer
    than `n_negatives` allowed ones repeats them in turn. Same inputs and generator state give the same lists. A
    candidate list must not hold items of its anchor's sequence (`nearest` leaves them out). Raises BadInput for
    `n_negatives` below 1 and a temperature that is not positive.
    """
    if n_negatives < 1:
        raise BadInput(f"n_negatives={n_negatives} makes no list; draw at least 1")
    if temperature is not None and not temperature > 0:
        raise BadInput(f"temperature={temperature} is not positive; leave it out to draw every rank alike")
    # Positives of two kinds: those in the list [query, k], and `n_beyond` [query] more that are not in it.
    inside = are_positive(lists, labels)
    members, taken, first, n_beyond = _beyond(lists, labels, sequences, inside)
    # [query, 2]: one number in [0, 1) decides the kind, the other one picks a positive beyond the list.
    draws = torch.rand(len(lists), 2, generator=generator, dtype=torch.float64)
    is_beyond = (n_beyond > 0) & ((draws[:, 0] < beyond_share) | ~inside.any(dim=1))
    # [query]: the positive if it comes from the list; meaningless where there is none.
    equal_chances = torch.zeros_like(lists.distances)
    from_inside = lists.items.gather(1, _gumbel_order(inside, equal_chances, 1, generator))[:, 0]
    # [query]: the positive if it comes from beyond: the `choice`-th place of the label that is not taken.
    choice = (draws[:, 1] * n_beyond).long().clamp(max=(n_beyond - 1).clamp(min=0))
    place = _skip(taken, choice) + first
    from_beyond = members[place.clamp(max=max(len(members) - 1, 0))]  # clamped where there is none
    positives = torch.where(is_beyond, from_beyond, from_inside)
    # [query, n_negatives]
    log_chances = equal_chances if temperature is None else -lists.distances / temperature
    negatives = lists.items.gather(1, _gumbel_order(allowed, log_chances, n_negatives, generator))
    # [list, 1 + n_negatives]: the rows of anchors that have a positive and a negative.
    has_both = (inside.any(dim=1) | (n_beyond > 0)) & allowed.any(dim=1)
    rows = has_both.nonzero()[:, 0]
    items = torch.cat([positives[:, None], negatives], dim=1)[rows]
    return TrainingLists(rows, items, is_beyond[rows])


def suspected_mislabels(
    lists: CandidateLists,
    labels: Int64[Tensor, " item"],
    max_distance: float,
) -> tuple[Int64[Tensor, "pair 2"], Float[Tensor, " pair"]]:
    """Pairs with different labels no further apart than `max_distance`: likely mislabelled images or duplicates.

    Each unordered pair once, the smaller item first, ordered by (distance, items).
    """
    close = are_negative(lists, labels) & (lists.distances <= max_distance)
    rows, columns = close.nonzero(as_tuple=True)
    # [pair, 2] with the smaller item first; pairs that both items list are the same row twice, so keep one of them.
    pairs = torch.stack([lists.query_items[rows], lists.items[rows, columns]], dim=1).sort(dim=1).values
    pairs, which = torch.unique(pairs, dim=0, return_inverse=True)
    distances = torch.empty(len(pairs), dtype=lists.distances.dtype)
    distances[which] = lists.distances[rows, columns]
    order = distances.argsort(stable=True)
    return pairs[order], distances[order]


def _similarities(
    lists: CandidateLists, labels: Tensor, embeddings: Tensor, sequences: Tensor | None
) -> tuple[Float[Tensor, "query k"], Float[Tensor, "query 1"]]:
    """Cosine similarity of each candidate, and of each anchor's least similar positive; inf where it has none.

    Float64, a few anchors at a time; a missing candidate has the similarity of item 0.
    """
    unit = normalize(embeddings.double(), dim=1)
    similarity = torch.cat(
        [
            torch.einsum("qd,qkd->qk", unit[anchors], unit[items.clamp(min=0)])
            for anchors, items in zip(lists.query_items.split(_ANCHORS), lists.items.split(_ANCHORS), strict=True)
        ]
    )
    least = torch.full((len(lists), 1), torch.inf, dtype=torch.float64)
    for label in labels[lists.query_items].unique().tolist():
        rows = (labels[lists.query_items] == label).nonzero()[:, 0]
        members = (labels == label).nonzero()[:, 0]
        for part in rows.split(_ANCHORS) if label >= 0 else ():
            anchors = lists.query_items[part]
            is_other = anchors[:, None] != members
            if sequences is not None:
                own = sequences[anchors][:, None]
                is_other &= (own < 0) | (own != sequences[members])
            found = torch.where(is_other, unit[anchors] @ unit[members].T, torch.inf)
            least[part, 0] = found.amin(dim=1)
    return similarity, least


def _labels_of(lists: CandidateLists, labels: Tensor) -> Tensor:
    """The label of each candidate [query, k]; -1 for missing candidates."""
    return torch.where(lists.items >= 0, labels[lists.items.clamp(min=0)], -1)


def _gumbel_order(allowed: Tensor, log_chances: Tensor, n_drawn: int, generator: torch.Generator) -> Tensor:
    """Columns [query, n_drawn] of weighted draws without replacement; a row with too few repeats them in turn."""
    # With Gumbel noise added to the log chances, the largest keys are a weighted draw without replacement.
    uniform = torch.rand(allowed.shape, generator=generator, dtype=torch.float64)
    keys = log_chances - torch.log(-torch.log(uniform.clamp(min=1e-300)))
    # [query, k]: the allowed columns in the order of their keys, then the others, which `turn` never reaches.
    order = torch.where(allowed, keys, -torch.inf).argsort(dim=1, descending=True, stable=True)
    turn = torch.arange(n_drawn) % allowed.sum(dim=1, keepdim=True).clamp(min=1)
    return order.gather(1, turn)


def _beyond(
    lists: CandidateLists, labels: Tensor, sequences: Tensor | None, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives that are not in the list, without writing them out: an anchor can have as many as its label has items.

    All items are sorted by (label, sequence, item) into `members` [item], so that an anchor's label is one range of
    places, starting at `first` [query]. A few places of it are `taken` [query, place]: those of the anchor's own
    sequence, the anchor included, and of the positives in its list. They are counted from `first`, ascend, and are
    filled up with a number beyond all places. Returns members, taken, first and the number of places left [query].
    """
    n_items = len(labels)
    # [item]: its sequence. An item without one is a sequence of its own.
    own = (
        torch.arange(n_items)
        if sequences is None
        else torch.where(sequences < 0, -1 - torch.arange(n_items), sequences)
    )
    # Two stable sorts give the order (label, sequence, item); `place_of` [item] is the place of each item in it.
    members = own.argsort(stable=True)
    members = members[labels[members].argsort(stable=True)]
    place_of = torch.empty_like(members)
    place_of[members] = torch.arange(n_items)
    # [query]: where the anchor's label starts, and how many items it has.
    sorted_labels = labels[members]
    anchor_labels = labels[lists.query_items].contiguous()
    first = torch.searchsorted(sorted_labels, anchor_labels)
    n_members = torch.searchsorted(sorted_labels, anchor_labels, right=True) - first
    # Within a label, items of one sequence stand together: the group of each place; sizes and starts [group].
    _, group, group_size = torch.unique_consecutive(
        torch.stack([sorted_labels, own[members]], dim=1), dim=0, return_inverse=True, return_counts=True
    )
    group_start = offsets_of(group_size)[:-1]
    # [query, largest group]: the places of the anchor's own group, counted from `first`.
    anchor_group = group[place_of[lists.query_items]]
    width = int(group_size[anchor_group].max()) if len(lists) else 0
    offsets = torch.arange(width)
    same = group_start[anchor_group][:, None] + offsets - first[:, None]
    same = torch.where(offsets < group_size[anchor_group][:, None], same, n_items + 1)
    # [query, k]: the places of the positives in the list, none of which is in the anchor's group.
    listed = torch.where(inside, place_of[lists.items.clamp(min=0)] - first[:, None], n_items + 1)
    taken = torch.cat([same, listed], dim=1).sort(dim=1).values
    n_left = n_members - (taken <= n_items).sum(dim=1)
    return members, taken, first, torch.where(anchor_labels >= 0, n_left, 0)


def _skip(taken: Int64[Tensor, "query place"], choice: Int64[Tensor, " query"]) -> Int64[Tensor, " query"]:
    """The `choice`-th number, from 0, that is not among the ascending `taken` of its row: ([0, 1, 4], 2) gives 5."""
    # taken[i] - i numbers below taken[i] are free, so it is passed exactly if these are no more than `choice`.
    passed = taken - torch.arange(taken.shape[1]) <= choice[:, None]
    return choice + passed.sum(dim=1)
