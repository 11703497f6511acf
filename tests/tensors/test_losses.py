"""Losses against hand values and literal formulas, their gradients, and shares of a batch under a global
normaliser.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distributed_rerank.tensors.losses import (
    binary_cross_entropy,
    list_distillation,
    listwise_softmax,
    margin_ranking,
    ranknet,
)


def close(found: Tensor, expected: float) -> None:
    assert math.isclose(found.item(), expected, rel_tol=1e-5, abs_tol=1e-6), (found.item(), expected)


def test_losses_hand_values() -> None:
    two, zero, log3 = torch.tensor([2.0]), torch.tensor([0.0]), math.log(3)
    close(binary_cross_entropy(torch.tensor([log3]), torch.tensor([True])), -math.log(0.75))
    close(binary_cross_entropy(torch.tensor([log3]), torch.tensor([False])), -math.log(0.25))
    lists = torch.tensor([[0.0, log3]])
    close(listwise_softmax(lists, torch.tensor([[True, False]])), -math.log(0.75))
    close(listwise_softmax(lists, torch.tensor([[True, True]])), -(math.log(0.75) + math.log(0.25)) / 2)
    close(ranknet(zero, two), math.log1p(math.exp(-2)))
    close(margin_ranking(zero, two, margin=0.5), 0.0)
    close(margin_ranking(two, zero, margin=0.5), 2.5)
    close(list_distillation(lists, lists + 7), 0.0)
    close(list_distillation(lists, torch.zeros(1, 2)), 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def literal_listwise(logits: Tensor, is_positive: Tensor, is_present: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(len(logits)):
        exponents = [torch.exp(-logits[row, c]) for c in range(logits.shape[1]) if is_present[row, c]]
        positives = [c for c in range(logits.shape[1]) if is_present[row, c] and is_positive[row, c]]
        for c in positives:
            total = total - torch.log(torch.exp(-logits[row, c]) / sum(exponents)) / len(positives)
    return total / len(logits)


def literal_distillation(logits: Tensor, teacher: Tensor, temperature: float, is_present: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(len(logits)):
        present = is_present[row].nonzero()[:, 0]
        student = torch.softmax(-logits[row, present] / temperature, dim=0)
        target = torch.softmax(-teacher[row, present] / temperature, dim=0)
        total = total + (target * (target.log() - student.log())).sum() * temperature**2
    return total / len(logits)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def test_list_losses_values_and_gradients_match_the_literal_formulas_with_absent_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    is_positive = torch.rand(6, 5, generator=generator) < 0.4
    is_positive[:, 0] = True
    is_present = torch.rand(6, 5, generator=generator) < 0.7
    is_present[:, 0] = True
    pairs = [
        (
            lambda x: listwise_softmax(x, is_positive, is_present),
            lambda x: literal_listwise(x, is_positive, is_present),
        ),
        (
            lambda x: list_distillation(x, teacher, 2.5, is_present),
            lambda x: literal_distillation(x, teacher, 2.5, is_present),
        ),
    ]
    for ours, literal in pairs:
        value, grad = gradient(ours, logits)
        expected, expected_grad = gradient(literal, logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)
        assert (grad[~is_present] == 0).all()


def test_pair_losses_values_and_gradients_match_the_literal_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, generator=generator, dtype=torch.float64)
    other = torch.randn(40, generator=generator, dtype=torch.float64)
    is_negative = torch.rand(40, generator=generator) < 0.5
    target = is_negative.double()
    pairs = [
        (
            lambda x: binary_cross_entropy(x, is_negative),
            lambda x: -(target * torch.sigmoid(x).log() + (1 - target) * (1 - torch.sigmoid(x)).log()).mean(),
        ),
        (lambda x: ranknet(x, other), lambda x: torch.log(1 + torch.exp(x - other)).mean()),
        (lambda x: margin_ranking(x, other, 0.3), lambda x: (0.3 + x - other).clamp(min=0).mean()),
    ]
    for ours, literal in pairs:
        for found, expected in zip(gradient(ours, logits), gradient(literal, logits), strict=True):
            torch.testing.assert_close(found, expected)


def test_every_loss_pulls_positives_together_and_pushes_negatives_apart() -> None:
    positive, negative = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    both = torch.cat([positive, negative])
    is_positive = torch.tensor([True, False])
    losses = [
        binary_cross_entropy(both, ~is_positive),
        listwise_softmax(both[None], is_positive[None]),
        ranknet(positive, negative),
        margin_ranking(positive, negative, 1.0),
        list_distillation(both[None], torch.tensor([[0.0, 1.0]])),
    ]
    for loss in losses:
        to_positive, to_negative = torch.autograd.grad(loss, (positive, negative), retain_graph=True)
        assert to_positive > 0
        assert to_negative < 0


@pytest.mark.parametrize("cut", [0, 3, 5])
def test_shares_of_a_batch_with_the_global_normaliser_add_up_to_the_whole(cut: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, other, teacher = (torch.randn(10, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = torch.rand(10, generator=generator, dtype=torch.float64)
    is_positive = torch.rand(10, 4, generator=generator) < 0.5
    is_positive[:, 1] = True
    losses: list[Callable[[Tensor, slice, Tensor | None], Tensor]] = [
        lambda x, s, n: binary_cross_entropy(x[s, 0], is_positive[s, 0], weights[s], n),
        lambda x, s, n: listwise_softmax(x[s], is_positive[s], None, weights[s], n),
        lambda x, s, n: ranknet(x[s, 0], other[s, 0], weights[s], n),
        lambda x, s, n: margin_ranking(x[s, 0], other[s, 0], 0.2, weights[s], n),
        lambda x, s, n: list_distillation(x[s], teacher[s], 2.0, None, weights[s], n),
    ]
    total = weights.sum()
    for loss in losses:
        whole = gradient(lambda x, loss=loss: loss(x, slice(None), None), logits)
        halves = [
            gradient(lambda x, loss=loss, s=s: loss(x, s, total), logits) for s in (slice(0, cut), slice(cut, 10))
        ]
        torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0])
        torch.testing.assert_close(halves[0][1] + halves[1][1], whole[1])
