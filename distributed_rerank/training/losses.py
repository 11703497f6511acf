"""The loss of a step from the logits of its pairs, or of a part of them. Layer 3."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.tensors import losses
from distributed_rerank.training.plan import TrainingStep


def step_loss(
    part: TrainingStep, logits: Float[Tensor, " pair"], config: TrainingConfig, n_units: int
) -> Float[Tensor, ""]:
    """The part's share of the mean loss over a step of `n_units`: pairs for bce, lists for the others.

    Logits are divided by `config.temperature` first. Losses of lists take every list by itself. Where the step has a
    teacher's logits, `config.teacher_share` of the loss is how far the list's distribution is from the teacher's.
    """
    logits = logits / config.temperature
    if config.loss == "bce":
        is_negative = part.is_negative.to(logits.device)
        return losses.binary_cross_entropy(logits, is_negative, normaliser=float(n_units))
    table, is_present, is_positive = as_lists(part, logits)
    by_labels = label_loss(table, is_present, is_positive, config, n_units)
    if part.teacher_logits is None:
        return by_labels
    teacher, _, _ = as_lists(part, part.teacher_logits.to(logits.device))
    by_teacher = teacher_loss(table, teacher, is_present, config.teacher_temperature, n_units)
    return (1 - config.teacher_share) * by_labels + config.teacher_share * by_teacher


def teacher_loss(
    table: Float[Tensor, "list candidate"],
    teacher: Float[Tensor, "list candidate"],
    is_present: Bool[Tensor, "list candidate"],
    temperature: float,
    n_lists: int,
) -> Float[Tensor, ""]:
    """Distillation over the candidates that the teacher has scored; a list with fewer than two teaches nothing."""
    is_known = is_present & teacher.isfinite()
    # One candidate alone has the same distribution whatever its logit; none at all would have no softmax.
    is_known[:, 0] |= ~is_known.any(dim=1)
    known = torch.where(is_known & teacher.isfinite(), teacher, 0.0)
    return losses.list_distillation(table, known, temperature, is_known, normaliser=float(n_lists))


def label_loss(
    table: Float[Tensor, "list candidate"],
    is_present: Bool[Tensor, "list candidate"],
    is_positive: Bool[Tensor, "list candidate"],
    config: TrainingConfig,
    n_units: int,
) -> Float[Tensor, ""]:
    """The loss of lists by their labels; with ranknet and margin a list is the mean over its (positive, negative)
    pairs."""
    if config.loss == "listwise":
        return losses.listwise_softmax(table, is_positive, is_present, normaliser=float(n_units))
    is_compared = (is_positive & is_present)[:, :, None] & (~is_positive & is_present)[:, None, :]
    row, positive, negative = is_compared.nonzero(as_tuple=True)
    weights = 1.0 / is_compared.sum(dim=(1, 2)).clamp(min=1)[row].to(table.dtype)
    compared = (table[row, positive], table[row, negative])
    if config.loss == "margin":
        return losses.margin_ranking(*compared, config.margin, weights, normaliser=float(n_units))
    return losses.ranknet(*compared, weights, normaliser=float(n_units))


def as_lists(part: TrainingStep, logits: Float[Tensor, " pair"]) -> tuple[Tensor, Tensor, Tensor]:
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
