"""Halves by label, so that what is chosen on one half is measured on labels that it has not seen; or too few for it."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

FEW_LABELS = 24
"""Train labels of two items or more up to which folds take the place of halves, and one gallery that of two."""
Permute = Callable[[int], Tensor | np.ndarray]


def half_of_labels(labels: Int64[Tensor, " entry"], permute: Permute) -> Bool[Tensor, " entry"]:
    """Which entries have one of the first n // 2 labels, after `permute(n)` has put the n distinct ones in an order.

    The permutation is the caller's, drawn by its own seeded generator: chains and figures that were computed before
    rest on it.
    """
    known = labels.unique()
    drawn = known[torch.as_tensor(permute(len(known)))]
    return torch.isin(labels, drawn[: len(known) // 2])


def usable_labels(labels: Int64[np.ndarray, " item"]) -> Int64[np.ndarray, " label"]:
    """Labels of two items or more."""
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    return known[counts > 1]
