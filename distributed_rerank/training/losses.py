"""The loss of a training step, or of one worker's part of it, from the logits of its pairs."""

import inspect

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distributed_rerank.config.own import is_own, load_own
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import losses
from distributed_rerank.tensors.ragged import places_in_rows
from distributed_rerank.training.plan import TrainingStep


def step_loss(
    part: TrainingStep, logits: Float[Tensor, " pair"], config: TrainingConfig, n_units: int
) -> Float[Tensor, ""]:
    """The part's share of the mean loss over a step of `n_units`: pairs for bce, lists for the others.

    Logits are divided by `config.temperature` first. If the step has a teacher's logits, `config.teacher_share` of a
    list's loss is the divergence of its distribution from the teacher's.
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
    """Distillation over the candidates that the teacher has scored; a list with fewer than two has loss 0."""
    is_known = is_present & teacher.isfinite()
    # No candidate would have no softmax; one alone has the same distribution for any logit, hence loss and gradient 0.
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
    """The loss of lists by their labels; ranknet and margin take a list's mean over its (positive, negative) pairs."""
    if is_own(config.loss):
        return own_loss(config.loss, table, is_present, is_positive) / n_units
    if config.loss == "listwise":
        return losses.listwise_softmax(table, is_positive, is_present, normaliser=float(n_units))
    # [list, candidate, candidate]: whether the first is a positive and the second a negative of the list. Each such
    # pair [compared] weighs 1 / their number in its list.
    is_compared = (is_positive & is_present)[:, :, None] & (~is_positive & is_present)[:, None, :]
    row, positive, negative = is_compared.nonzero(as_tuple=True)
    weights = 1.0 / is_compared.sum(dim=(1, 2)).clamp(min=1)[row].to(table.dtype)
    # `index_select`, for the sums of its gradient have one order, whatever the number of threads.
    first = row * table.shape[1]
    positives, negatives = (table.flatten().index_select(0, first + column) for column in (positive, negative))
    if config.loss == "margin":
        return losses.margin_ranking(positives, negatives, config.margin, weights, normaliser=float(n_units))
    return losses.ranknet(positives, negatives, weights, normaliser=float(n_units))


def own_loss(
    name: str,
    table: Float[Tensor, "list candidate"],
    is_present: Bool[Tensor, "list candidate"],
    is_positive: Bool[Tensor, "list candidate"],
) -> Float[Tensor, ""]:
    """The sum of what a loss of the user's gives for each list.

    Raises BadInput where it takes other arguments, and where it gives something else than one number a list.
    """
    loss = load_own(name)
    try:
        inspect.signature(loss).bind(table, is_positive, is_present)
    except TypeError as error:
        raise BadInput(f"--loss {name} must take (logits, is_positive, is_present): {error}") from None
    values = loss(table, is_positive, is_present)
    if not isinstance(values, Tensor) or values.shape != table.shape[:1] or not values.is_floating_point():
        shape = tuple(getattr(values, "shape", ()))
        raise BadInput(f"--loss {name} must return one number for each of {len(table)} lists, not {shape}")
    return values.sum()


def as_lists(part: TrainingStep, logits: Float[Tensor, " pair"]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, presence and positives [list, candidate]; lists shorter than the longest are filled up."""
    # [pair]: the list of each pair (ascending), and its place in that list. The longest list gives the width.
    row = part.list_of_pair.to(logits.device)
    counts = torch.bincount(row, minlength=part.n_lists())
    place = places_in_rows(row, counts)
    shape = (part.n_lists(), int(counts.max()))
    # `index_put` and not assignment, so that gradients flow from the table to the logits.
    table = logits.new_zeros(shape).index_put((row, place), logits)
    is_present = torch.zeros(shape, dtype=torch.bool, device=row.device)
    is_present[row, place] = True
    is_positive = torch.zeros_like(is_present)
    is_positive[row, place] = ~part.is_negative.to(row.device)
    return table, is_present, is_positive
