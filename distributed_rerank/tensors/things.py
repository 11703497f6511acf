"""Results by thing instead of by photo: several photos (views) show one thing, and their evidence is combined."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from distributed_rerank.tensors.candidate_lists import CandidateLists

Combination = Literal["best", "noisy_or", "mean"]


@dataclass(frozen=True)
class ThingLists:
    """Things of each query, best first; a shorter list is filled up with -1 and NaN."""

    things: Int64[Tensor, "query k"]
    views: Int64[Tensor, "query k"]
    """The item number of the thing's first photo in the list."""
    n_views: Int64[Tensor, "query k"]
    """How many of its photos are in the list."""
    probabilities: Float64[Tensor, "query k"]
    """That it is a match, from all its photos that have a probability; NaN where none has."""


def by_thing(
    lists: CandidateLists,
    probabilities: Float[Tensor, "query k"] | None,
    things: Int64[Tensor, " item"],
    combination: Combination,
) -> ThingLists:
    """The things that the candidates of each list show.

    `things` numbers what each item shows, from 0. `probabilities` are those of a match, NaN where there is none; with
    p of a thing's photos, `best` is max p, `mean` their mean and `noisy_or` 1 - prod(1 - p). `best` keeps the order of
    the things' first photos; the others sort by their value, ties and things without a value by the first photo.
    """
    # [candidate]: row and place of each candidate there is; [group]: one number for each thing of a query, ascending.
    row, place = (lists.items >= 0).nonzero(as_tuple=True)
    n_things = int(things.max()) + 1 if len(things) else 1
    keys, group = (row * n_things + things[lists.items[row, place]]).unique(return_inverse=True)
    n_views = torch.bincount(group, minlength=len(keys))
    first = torch.full((len(keys),), lists.items.shape[1]).scatter_reduce_(0, group, place, "amin")
    p = torch.full(row.shape, torch.nan, dtype=torch.float64)
    if probabilities is not None:
        p = probabilities[row, place].double()
    value = _combined(p, group, len(keys), combination)
    # Sorted three times, each sort keeping the order of the one before: by first photo, then value, then query.
    order = first.argsort(stable=True)
    if combination != "best":
        order = order[value.nan_to_num(nan=-1.0)[order].argsort(descending=True, stable=True)]
    query = keys // n_things
    order = order[query[order].argsort(stable=True)]
    # [group]: the place of each in its query's list.
    counts = torch.bincount(query, minlength=len(lists))
    column = torch.arange(len(order)) - (counts.cumsum(0) - counts)[query[order]]
    shape = (len(lists), int(counts.max()) if len(counts) else 0)
    found = ThingLists(
        things=torch.full(shape, -1),
        views=torch.full(shape, -1),
        n_views=torch.zeros(shape, dtype=torch.int64),
        probabilities=torch.full(shape, torch.nan, dtype=torch.float64),
    )
    at = query[order], column
    found.things[at] = keys[order] % n_things
    found.views[at] = lists.items[query, first][order]
    found.n_views[at], found.probabilities[at] = n_views[order], value[order]
    return found


def _combined(
    p: Float64[Tensor, " candidate"], group: Int64[Tensor, " candidate"], n: int, combination: Combination
) -> Float64[Tensor, " group"]:
    """The value of each group from those of its candidates that have one; NaN where none has."""
    known = p.isfinite()
    group, p = group[known], p[known]
    counts = torch.bincount(group, minlength=n)
    if combination == "best":
        value = torch.zeros(n, dtype=torch.float64).scatter_reduce_(0, group, p, "amax")
    elif combination == "mean":
        value = torch.zeros(n, dtype=torch.float64).index_add_(0, group, p) / counts.clamp(min=1)
    else:
        value = -torch.expm1(torch.zeros(n, dtype=torch.float64).index_add_(0, group, torch.log1p(-p)))
    return torch.where(counts > 0, value, torch.nan)


def count_relevant_things(
    query_items: Int64[Tensor, " query"],
    gallery_items: Int64[Tensor, " gallery"],
    labels: Int64[Tensor, " item"],
    sequences: Int64[Tensor, " item"],
    things: Int64[Tensor, " item"],
) -> Int64[Tensor, " query"]:
    """How many things of its label each query can find: with a gallery photo but itself and its own sequence.

    Sequence -1 is none; a query of label -1 has none. All photos of a thing have one label.
    """
    gallery = gallery_items[labels[gallery_items] >= 0]
    n_labels, n_sequences = (max(0, int(codes.max())) + 1 for codes in (labels, sequences))
    # [thing]: its gallery photos and its label; [label]: the things that it has in the gallery.
    n_photos = torch.bincount(things[gallery], minlength=int(things.max()) + 1)
    label = torch.zeros_like(n_photos).scatter_(0, things[gallery], labels[gallery])
    n_of_label = torch.bincount(label[n_photos > 0], minlength=n_labels)
    # [hidden]: one number (label, sequence) for each thing whose photos all lie in that sequence.
    in_sequence = gallery[sequences[gallery] >= 0]
    pairs, counts = (things[in_sequence] * n_sequences + sequences[in_sequence]).unique(return_counts=True)
    whole = pairs[counts == n_photos[pairs // n_sequences]]
    hidden = (label[whole // n_sequences] * n_sequences + whole % n_sequences).sort().values
    own_label, own_sequence = labels[query_items], sequences[query_items]
    own = own_label * n_sequences + own_sequence
    n_hidden = torch.searchsorted(hidden, own, right=True) - torch.searchsorted(hidden, own)
    is_only_photo = torch.isin(query_items, gallery) & (n_photos[things[query_items]] == 1)
    n_hidden = torch.where(own_sequence >= 0, n_hidden, is_only_photo.long())
    return torch.where(own_label >= 0, n_of_label[own_label.clamp(min=0)] - n_hidden, 0)
