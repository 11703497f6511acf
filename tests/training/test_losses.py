"""The losses of a step: the definitions, whole or summed over shares, and what a teacher adds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.training.losses import own_loss, step_loss, teacher_loss
from distributed_rerank.training.plan import TrainingStep, share_of


@pytest.mark.parametrize("loss", ["bce", "listwise", "ranknet", "margin"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_step_loss_summed_over_shares_is_its_definition(loss: str, world_size: int) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1, -0.4, 1.5])
    is_negative = torch.tensor([False, True, True, False, True, False, True])
    lists = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    step = TrainingStep(torch.arange(7), torch.arange(7) + 10, is_negative, lists, torch.ones(7))
    config = TrainingConfig(loss=loss, margin=0.8)  # pyright: ignore[reportArgumentType]
    total, start = 0.0, 0
    for rank in range(world_size):
        share = share_of(step, rank, world_size, loss != "bce")
        if len(share):
            total += float(step_loss(share, logits[start : start + len(share)], config, step.n_units(loss)))
        start += len(share)
    assert total == pytest.approx(float(literal_loss(logits, is_negative, lists, loss)), abs=1e-6)


def literal_loss(logits: Tensor, is_negative: Tensor, lists: Tensor, loss: str) -> Tensor:
    """The definitions, pair by pair and list by list."""
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(logits, is_negative.float())
    values = []
    for number in lists.unique():
        positive, negative = logits[(lists == number) & ~is_negative], logits[(lists == number) & is_negative]
        if loss == "listwise":
            values.append(functional.cross_entropy(-torch.cat([positive, negative])[None], torch.tensor([0])))
        elif loss == "margin":
            values.append((0.8 + positive[:, None] - negative).clamp(min=0).mean())
        else:
            values.append(torch.log1p(torch.exp(positive[:, None] - negative)).mean())
    return torch.stack(values).mean()


def test_teacher_loss_is_the_divergence_over_what_is_known_and_nothing_where_too_little_is() -> None:
    table = torch.tensor([[0.3, -1.0, 2.0], [0.5, 0.1, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, torch.nan, -2.0], [torch.nan, torch.nan, 0.0], [torch.nan] * 3])
    is_present = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    loss = teacher_loss(table, teacher, is_present, 2.0, 3)
    own, other = (functional.log_softmax(-x[0, [0, 2]] / 2.0, dim=0) for x in (table, teacher))
    expected = 4 * (other.exp() * (other - own)).sum() / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert table.grad is not None
    assert table.grad.isfinite().all()
    assert not table.grad[1:].any()
    assert table.grad[0, 1] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(logits, is_positive, is_present): return logits.sum(dim=1)", ""),
        ("(logits, is_positive, is_present): return logits.sum()", r"one number for each of 4 lists, not \(\)"),
        ("(logits, is_positive, is_present): return logits", r"one number for each of 4 lists, not \(4, 3\)"),
        ("(logits): return logits.sum(dim=1)", "must take .logits, is_positive, is_present.: too many positional"),
    ],
)
def test_loss_of_ones_own_is_one_number_a_list(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def loss{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    table, everything = torch.arange(12.0).view(4, 3), torch.ones(4, 3, dtype=torch.bool)
    if not message:
        assert float(own_loss(f"{name}:loss", table, everything, everything)) == 66.0
        return
    with pytest.raises(BadInput, match=message):
        own_loss(f"{name}:loss", table, everything, everything)
