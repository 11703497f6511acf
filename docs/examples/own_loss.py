"""A loss of your own: of each list, the farthest positive against the nearest negative.

Put its folder on PYTHONPATH: distributed-rerank train --loss own_loss:hardest ...
A list is an anchor's row of `logits` (large = different); shorter ones are filled up, `is_present` says with what.
"""

import torch
from torch import Tensor


def hardest(logits: Tensor, is_positive: Tensor, is_present: Tensor) -> Tensor:
    """One number for each list; the step takes their mean over all workers."""
    positives, negatives = is_positive & is_present, ~is_positive & is_present
    farthest = logits.masked_fill(~positives, -torch.inf).amax(dim=1)
    nearest = logits.masked_fill(~negatives, torch.inf).amin(dim=1)
    return torch.nn.functional.softplus(1 + farthest - nearest)
