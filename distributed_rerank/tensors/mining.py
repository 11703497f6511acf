"""Pairs of a labelled batch, by the definitions of OML's `PairsMiner`.

Pairs are unordered, written with the smaller batch position first; positives come before negatives, each group sorted.
Two things differ from OML on purpose: an item is never paired with itself, and a batch of one label is an error (OML
takes its nearest positives for negatives there). Mining over a whole catalogue is in `candidate_mining`.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput

Pairs = tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"], Bool[Tensor, " pair"]]
"""Batch positions of the first and second items, and whether their labels differ: `(ids1, ids2, is_negative)`."""


def hard_pairs(embeddings: Float[Tensor, "item dim"], labels: Int64[Tensor, " item"]) -> Pairs:
    """Each item with its furthest positive and its nearest negative; mutual choices appear once.

    Of equal distances the first item in the batch counts, the item itself included, whose pair is then dropped: an item
    whose positives all equal it, or that is alone with its label, has no positive pair. Distances are exact
    (differences in float64); no gradient flows. Raises BadInput for a batch with fewer than two labels.
    """
    _check_two_labels(labels)
    # [item, item]: exact distances, of which each item chooses one column with its label and one with another.
    points = embeddings.detach().double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    is_same = labels[:, None] == labels
    positive = _first_largest(torch.where(is_same, distances, -torch.inf))
    negative = _first_largest(torch.where(is_same, -torch.inf, -distances))
    items = torch.arange(len(labels), device=labels.device)
    return _positives_first(_unique(items, positive), _unique(items, negative))


def _check_two_labels(labels: Tensor) -> None:
    if len(labels) == 0 or bool((labels == labels[0]).all()):
        raise BadInput(
            f"a batch of {len(labels)} items has fewer than two labels, so it has no negatives; "
            "raise n_labels of the sampler"
        )


def _first_largest(values: Float[Tensor, "item other"]) -> Int64[Tensor, " item"]:
    """The first column with the largest value of each row (torch's argmax promises no order among equals)."""
    columns = torch.arange(values.shape[1], device=values.device)
    is_largest = values == values.amax(dim=1, keepdim=True)
    return torch.where(is_largest, columns, values.shape[1]).amin(dim=1)


def _unique(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct unordered pairs without pairs of an item with itself, sorted."""
    n_items = len(left)
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    codes = torch.unique((low * n_items + high)[low < high])
    return codes // n_items, codes % n_items


def _positives_first(positives: tuple[Tensor, Tensor], negatives: tuple[Tensor, Tensor]) -> Pairs:
    is_negative = torch.zeros(len(positives[0]) + len(negatives[0]), dtype=torch.bool, device=positives[0].device)
    is_negative[len(positives[0]) :] = True
    return torch.cat([positives[0], negatives[0]]), torch.cat([positives[1], negatives[1]]), is_negative
