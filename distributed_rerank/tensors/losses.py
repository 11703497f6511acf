"""Training losses on logits and distances, where larger always means more different.

Every loss is `sum(weights * values) / normaliser`. By default the normaliser is the sum of this call's weights.
Data-parallel ranks pass the sum of the weights of *all* ranks: then their losses (and gradients) add up to those of the
whole batch, however it was shared out.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Normaliser = float | Float[Tensor, ""] | None


def binary_cross_entropy(
    logits: Float[Tensor, " pair"],
    is_negative: Bool[Tensor, " pair"],
    weights: Float[Tensor, " pair"] | None = None,
    normaliser: Normaliser = None,
) -> Float[Tensor, ""]:
    """OML's loss for pairwise models: BCE with logits, the target being 1 for a negative pair."""
    values = functional.binary_cross_entropy_with_logits(logits, is_negative.to(logits.dtype), reduction="none")
    return _weighted(values, weights, normaliser)


def listwise_softmax(
    logits: Float[Tensor, "list candidate"],
    is_positive: Bool[Tensor, "list candidate"],
    is_present: Bool[Tensor, "list candidate"] | None = None,
    weights: Float[Tensor, " list"] | None = None,
    normaliser: Normaliser = None,
) -> Float[Tensor, ""]:
    """Cross entropy between "uniform over the positives" and softmax(-logits) over a candidate list.

    ListNet's top-one loss (Cao et al. 2007) with binary relevance; with one positive it is InfoNCE (van den Oord et al.
    2018) over the list. Absent candidates (padding) take no part. Every list needs a positive.
    """
    is_present = torch.ones_like(is_positive) if is_present is None else is_present
    is_target = is_positive & is_present
    n_positives = is_target.sum(dim=1)
    assert bool((n_positives > 0).all()), "a list without a positive has no listwise loss"
    # [list, candidate]: log softmax over the present candidates; then [list]: its negated mean over the positives.
    log_shares = (-logits).masked_fill(~is_present, -torch.inf).log_softmax(dim=1)
    values = -log_shares.masked_fill(~is_target, 0.0).sum(dim=1) / n_positives
    return _weighted(values, weights, normaliser)


def ranknet(
    positive_logits: Float[Tensor, " pair"],
    negative_logits: Float[Tensor, " pair"],
    weights: Float[Tensor, " pair"] | None = None,
    normaliser: Normaliser = None,
) -> Float[Tensor, ""]:
    """log(1 + exp(positive - negative)): the positive should be the less different one (Burges et al. 2005)."""
    return _weighted(functional.softplus(positive_logits - negative_logits), weights, normaliser)


def margin_ranking(
    positive_logits: Float[Tensor, " pair"],
    negative_logits: Float[Tensor, " pair"],
    margin: float,
    weights: Float[Tensor, " pair"] | None = None,
    normaliser: Normaliser = None,
) -> Float[Tensor, ""]:
    """max(0, margin + positive - negative): 0 once the negative is `margin` further away (Joachims 2002)."""
    return _weighted(functional.relu(margin + positive_logits - negative_logits), weights, normaliser)


def list_distillation(
    logits: Float[Tensor, "list candidate"],
    teacher_logits: Float[Tensor, "list candidate"],
    temperature: float = 1.0,
    is_present: Bool[Tensor, "list candidate"] | None = None,
    weights: Float[Tensor, " list"] | None = None,
    normaliser: Normaliser = None,
) -> Float[Tensor, ""]:
    """KL divergence of the student's list distribution softmax(-logits / T) from the teacher's, times T^2.

    The factor keeps the size of gradients independent of T (Hinton et al. 2015). Absent candidates take no part.
    """
    assert temperature > 0, f"temperature={temperature} is not positive"
    is_present = torch.ones_like(logits, dtype=torch.bool) if is_present is None else is_present
    student = (-logits / temperature).masked_fill(~is_present, -torch.inf).log_softmax(dim=1)
    teacher = (-teacher_logits.detach() / temperature).masked_fill(~is_present, -torch.inf).log_softmax(dim=1)
    # Absent entries would be 0 * (inf - inf); they are set to 0 before the product so that gradients stay finite.
    gaps = teacher.masked_fill(~is_present, 0.0) - student.masked_fill(~is_present, 0.0)
    return _weighted((teacher.exp() * gaps).sum(dim=1) * temperature**2, weights, normaliser)


def _weighted(values: Tensor, weights: Tensor | None, normaliser: Normaliser) -> Tensor:
    """Sum of weighted values over the normaliser; 0 for nothing at all."""
    weights = torch.ones_like(values) if weights is None else weights
    total = (weights * values).sum()
    return total / (weights.sum().clamp(min=torch.finfo(total.dtype).tiny) if normaliser is None else normaliser)
