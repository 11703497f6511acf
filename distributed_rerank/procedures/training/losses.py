"""The loss of a step from the logits of its pairs, or of a part of them. Layer 3."""

import torch
from jaxtyping import Float
from torch import Tensor

from distributed_rerank.procedures.training.plan import Step
from distributed_rerank.tensors import losses


def step_loss(
    part: Step, logits: Float[Tensor, " pair"], loss: str, n_units: int, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """The part's share of the mean loss over a step of `n_units`: pairs for bce, lists for listwise and ranknet.

    Logits are divided by `temperature` first. listwise and ranknet take every list by itself; a list of ranknet is
    the mean over its (positive, negative) pairs.
    """
    is_negative = part.is_negative.to(logits.device)
    logits = logits / temperature
    if loss == "bce":
        return losses.binary_cross_entropy(logits, is_negative, normaliser=float(n_units))
    table, is_present, is_positive = as_lists(part, logits)
    if loss == "listwise":
        return losses.listwise_softmax(table, is_positive, is_present, normaliser=float(n_units))
    is_compared = (is_positive & is_present)[:, :, None] & (~is_positive & is_present)[:, None, :]
    row, positive, negative = is_compared.nonzero(as_tuple=True)
    weights = 1.0 / is_compared.sum(dim=(1, 2)).clamp(min=1)[row].to(logits.dtype)
    return losses.ranknet(table[row, positive], table[row, negative], weights, normaliser=float(n_units))


def as_lists(part: Step, logits: Float[Tensor, " pair"]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, presence and positives as one row a list, shorter lists filled up."""
    row = part.list_of_pair.to(logits.device)
    counts = torch.bincount(row, minlength=part.n_lists())
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (part.n_lists(), int(counts.max()))
    table = logits.new_zeros(shape).index_put((row, place), logits)
    is_present = torch.zeros(shape, dtype=torch.bool, device=row.device)
    is_present[row, place] = True
    is_positive = torch.zeros_like(is_present)
    is_positive[row, place] = ~part.is_negative.to(row.device)
    return table, is_present, is_positive
