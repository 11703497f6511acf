"""Training lists drawn from the candidate lists of a whole training set, the kind that is re-ranked later.

Layer 1. An anchor is a row of `Neighbours`; `labels` and `sequences` are indexed by item number, -1 meaning
none. A candidate without a label is neither positive nor negative. The filters against false negatives have
the meaning of sentence-transformers' `mine_hard_negatives`, turned from similarities (large = same) to
distances (small = same).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.config.training import NegativeFilters
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.knn import Neighbours


@dataclass(frozen=True)
class TrainingLists:
    """Lists to train on: column 0 of `items` is the positive, the others are negatives of that anchor."""

    rows: Int64[Tensor, " list"]
    """Which row of the neighbours is the anchor."""
    items: Int64[Tensor, "list candidate"]
    is_beyond: Bool[Tensor, " list"]
    """Whether the positive was drawn from beyond the anchor's candidate list."""


def are_positive(
    neighbours: Neighbours, anchor_items: Int64[Tensor, " query"], labels: Int64[Tensor, " item"]
) -> Bool[Tensor, "query neighbour"]:
    """Whether each candidate has its anchor's label; False for fillers and where either has none."""
    anchor_labels = labels[anchor_items][:, None]
    return (_labels_of(neighbours, labels) == anchor_labels) & (anchor_labels >= 0)


def are_negative(
    neighbours: Neighbours, anchor_items: Int64[Tensor, " query"], labels: Int64[Tensor, " item"]
) -> Bool[Tensor, "query neighbour"]:
    """Whether each candidate has another label than its anchor; False if either has none."""
    anchor_labels = labels[anchor_items][:, None]
    candidate_labels = _labels_of(neighbours, labels)
    return (candidate_labels != anchor_labels) & (candidate_labels >= 0) & (anchor_labels >= 0)


def filter_negatives(
    neighbours: Neighbours,
    anchor_items: Int64[Tensor, " query"],
    labels: Int64[Tensor, " item"],
    filters: NegativeFilters,
) -> tuple[Bool[Tensor, "query neighbour"], dict[str, int]]:
    """The negatives that pass all filters, and how many candidates each filter dropped (a candidate counts
    once).

    With several positives in a list the margins refer to the furthest, as in sentence-transformers. If there
    is none in the list, every candidate is nearer than any positive and a margin drops them all.
    """
    distances = neighbours.distances
    positives = are_positive(neighbours, anchor_items, labels)
    furthest = torch.where(positives, distances, -torch.inf).amax(dim=1, keepdim=True)
    furthest = torch.where(positives.any(dim=1, keepdim=True), furthest, torch.inf)
    allowed = are_negative(neighbours, anchor_items, labels)
    dropped: dict[str, int] = {}
    lowest = {
        "absolute_margin": None if filters.absolute_margin is None else furthest + filters.absolute_margin,
        "relative_margin": None if filters.relative_margin is None else furthest * (1 + filters.relative_margin),
        "min_distance": filters.min_distance,
    }
    for name, bound in lowest.items():
        if bound is not None:
            dropped[name] = int((allowed & (distances < bound)).sum())
            allowed = allowed & ~(distances < bound)
    rank = allowed.cumsum(dim=1) - 1
    too_early = allowed & (rank < filters.range_min)
    too_late = allowed & (rank >= (allowed.shape[1] if filters.range_max is None else filters.range_max))
    dropped |= {"range_min": int(too_early.sum()), "range_max": int(too_late.sum())}
    return allowed & ~too_early & ~too_late, dropped


def draw_lists(
    neighbours: Neighbours,
    anchor_items: Int64[Tensor, " query"],
    labels: Int64[Tensor, " item"],
    allowed: Bool[Tensor, "query neighbour"],
    *,
    n_negatives: int,
    generator: torch.Generator,
    beyond_share: float = 0.0,
    temperature: float | None = None,
    sequences: Int64[Tensor, " item"] | None = None,
) -> TrainingLists:
    """One list "1 positive + n negatives" for every anchor that has both; other anchors are left out.

    The positive is uniform among those in the candidate list or, for a random `beyond_share` of the anchors,
    among those beyond it (another sequence than the anchor's); whoever has only one kind takes that. The
    negatives are drawn without replacement from `allowed`, every rank alike or, with a temperature, in
    proportion to exp(-distance / temperature) (Gumbel top-k, Kool et al. 2019). An anchor with fewer allowed
    than `n_negatives` repeats them in turn. Same inputs and generator state give the same lists.
    """
    if n_negatives < 1:
        raise BadInput(f"n_negatives={n_negatives} makes no list; draw at least 1")
    if temperature is not None and not temperature > 0:
        raise BadInput(f"temperature={temperature} is not positive; leave it out to draw every rank alike")
    inside = are_positive(neighbours, anchor_items, labels)
    members, position, first, n_beyond = _beyond(neighbours, anchor_items, labels, sequences, inside)
    nothing = torch.zeros_like(neighbours.distances)
    draws = torch.rand(len(anchor_items), 2, generator=generator, dtype=torch.float64)
    is_beyond = (n_beyond > 0) & ((draws[:, 0] < beyond_share) | ~inside.any(dim=1))
    from_inside = neighbours.items.gather(1, _gumbel_order(inside, nothing, 1, generator))[:, 0]
    step = (draws[:, 1] * n_beyond).long().clamp(max=(n_beyond - 1).clamp(min=0))
    place = _skip(position, step) + first
    from_beyond = members[place.clamp(max=max(len(members) - 1, 0))]
    positives = torch.where(is_beyond, from_beyond, from_inside)
    weight = nothing if temperature is None else -neighbours.distances / temperature
    negatives = neighbours.items.gather(1, _gumbel_order(allowed, weight, n_negatives, generator))
    has_both = (inside.any(dim=1) | (n_beyond > 0)) & allowed.any(dim=1)
    rows = has_both.nonzero()[:, 0]
    items = torch.cat([positives[:, None], negatives], dim=1)[rows]
    return TrainingLists(rows, items, is_beyond[rows])


def suspected_mislabels(
    neighbours: Neighbours,
    anchor_items: Int64[Tensor, " query"],
    labels: Int64[Tensor, " item"],
    max_distance: float,
) -> tuple[Int64[Tensor, "pair 2"], Float[Tensor, " pair"]]:
    """Pairs of items with different labels no further apart than `max_distance`: mislabelled images or
    duplicates.

    Each unordered pair once, the smaller item first, ordered by (distance, items).
    """
    close = are_negative(neighbours, anchor_items, labels) & (neighbours.distances <= max_distance)
    rows, columns = close.nonzero(as_tuple=True)
    pairs = torch.stack([anchor_items[rows], neighbours.items[rows, columns]], dim=1).sort(dim=1).values
    pairs, which = torch.unique(pairs, dim=0, return_inverse=True)
    distances = torch.empty(len(pairs), dtype=neighbours.distances.dtype)
    distances[which] = neighbours.distances[rows, columns]
    order = distances.argsort(stable=True)
    return pairs[order], distances[order]


def _labels_of(neighbours: Neighbours, labels: Tensor) -> Tensor:
    return torch.where(neighbours.items >= 0, labels[neighbours.items.clamp(min=0)], -1)


def _gumbel_order(allowed: Tensor, log_weight: Tensor, n_drawn: int, generator: torch.Generator) -> Tensor:
    """Columns of `n_drawn` weighted draws without replacement per row; a row with too few repeats them in
    turn.
    """
    uniform = torch.rand(allowed.shape, generator=generator, dtype=torch.float64)
    keys = log_weight - torch.log(-torch.log(uniform.clamp(min=1e-300)))
    order = torch.where(allowed, keys, -torch.inf).argsort(dim=1, descending=True, stable=True)
    turn = torch.arange(n_drawn) % allowed.sum(dim=1, keepdim=True).clamp(min=1)
    return order.gather(1, turn)


def _beyond(
    neighbours: Neighbours, anchor_items: Tensor, labels: Tensor, sequences: Tensor | None, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives not in the list, without ever listing them: they can be as many as a label has items, per
    anchor.

    Items are sorted by (label, sequence, item), so an anchor's label is one range of `members` starting at
    `first`, and what is not to be drawn is a few places of this range: its own sequence and the positives of
    its list. Returns members, those places (ascending, relative to `first`, filled with a large number),
    first, count left.
    """
    n_items = len(labels)
    # An item without a sequence is a sequence of its own.
    own = (
        torch.arange(n_items)
        if sequences is None
        else torch.where(sequences < 0, -1 - torch.arange(n_items), sequences)
    )
    members = own.argsort(stable=True)
    members = members[labels[members].argsort(stable=True)]
    place_of = torch.empty_like(members)
    place_of[members] = torch.arange(n_items)
    sorted_labels = labels[members]
    anchor_labels = labels[anchor_items].contiguous()
    first = torch.searchsorted(sorted_labels, anchor_labels)
    n_members = torch.searchsorted(sorted_labels, anchor_labels, right=True) - first
    _, group, group_size = torch.unique_consecutive(
        torch.stack([sorted_labels, own[members]], dim=1), dim=0, return_inverse=True, return_counts=True
    )
    group_start = group_size.cumsum(0) - group_size
    anchor_group = group[place_of[anchor_items]]
    width = int(group_size[anchor_group].max()) if len(anchor_items) else 0
    offsets = torch.arange(width)
    same = group_start[anchor_group][:, None] + offsets - first[:, None]
    same = torch.where(offsets < group_size[anchor_group][:, None], same, n_items + 1)
    listed = torch.where(inside, place_of[neighbours.items.clamp(min=0)] - first[:, None], n_items + 1)
    places = torch.cat([same, listed], dim=1).sort(dim=1).values
    n_left = n_members - (places <= n_items).sum(dim=1)
    return members, places, first, torch.where(anchor_labels >= 0, n_left, 0)


def _skip(places: Int64[Tensor, "query place"], step: Int64[Tensor, " query"]) -> Int64[Tensor, " query"]:
    """The `step`-th number, from 0, that is not among the ascending places of its row."""
    passed = places - torch.arange(places.shape[1]) <= step[:, None]
    return step + passed.sum(dim=1)
