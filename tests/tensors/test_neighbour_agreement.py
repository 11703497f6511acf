"""Neighbour agreement: against a plain loop, and its values for closed groups and for none."""

import pytest
import torch

from distributed_rerank.tensors.neighbour_agreement import COMPARED, neighbour_agreement


def by_loop(x: torch.Tensor, item: int, size: int) -> float:
    distances = torch.cdist(x.double(), x.double())

    def group(i: int) -> list[int]:
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: (float(distances[i, j]), j))
        return [i, *order[:size]]

    own = group(item)
    shares = [(len(set(own) & set(group(j))) - 1) / size for j in own[1 : COMPARED + 1]]
    return sum(shares) / len(shares)


def test_agreement_is_that_of_a_loop_for_each_size() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    items = torch.tensor([0, 7, 31, 59])
    sizes = torch.tensor([[1, 4, 20], [2, 12, 59], [3, 3, 1], [15, 1, 7]])
    found = neighbour_agreement(x, items, sizes)
    for row, item in enumerate(items.tolist()):
        for column, size in enumerate(sizes[row].tolist()):
            assert float(found[row, column]) == pytest.approx(by_loop(x, item, size), abs=1e-12)


def test_agreement_is_one_in_closed_groups_and_low_without_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(20).repeat_interleave(6)
    noise = torch.randn(120, 64, generator=generator)
    grouped = 100 * torch.randn(20, 64, generator=generator)[labels] + noise
    items, size = torch.arange(120), torch.full((120, 1), 5)
    assert float(neighbour_agreement(grouped, items, size).min()) == 1
    assert float(neighbour_agreement(noise, items, size).mean()) < 0.5
