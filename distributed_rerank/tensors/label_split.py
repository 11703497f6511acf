"""Halves by label, so that what is chosen on one half is measured on labels that it has not seen."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Permute = Callable[[int], Tensor | np.ndarray]


def half_of_labels(labels: Int64[Tensor, " entry"], permute: Permute) -> Bool[Tensor, " entry"]:
    """Which entries have one of the first n // 2 labels, after `permute(n)` has put the n distinct ones in an order.

    The permutation is the caller's, drawn by its own seeded generator: chains and figures that were computed before
    rest on it.
    """
    known = labels.unique()
    drawn = known[torch.as_tensor(permute(len(known)))]
    return torch.isin(labels, drawn[: len(known) // 2])
