"""In-batch pairs against OML's definition by brute force (oml-semantics 1.1 and case 8)."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.mining import hard_pairs

PairSet = set[tuple[int, int]]


def as_sets(pairs: tuple[Tensor, Tensor, Tensor]) -> tuple[PairSet, PairSet]:
    rows = list(zip(*(column.tolist() for column in pairs), strict=True))
    assert len(rows) == len(set(rows))
    return {(a, b) for a, b, negative in rows if not negative}, {(a, b) for a, b, negative in rows if negative}


def brute_force(embeddings: list[list[float]], labels: list[int]) -> tuple[PairSet, PairSet]:
    points = np.array(embeddings, dtype=np.float64)
    distances = np.sqrt(((points[:, None] - points) ** 2).sum(axis=2))
    positives, negatives = set(), set()
    for i in range(len(labels)):
        same = [j for j in range(len(labels)) if labels[j] == labels[i]]
        other = [j for j in range(len(labels)) if labels[j] != labels[i]]
        furthest = max(same, key=lambda j: (distances[i, j], -j))
        nearest = min(other, key=lambda j: (distances[i, j], j))
        positives.add((min(i, furthest), max(i, furthest)))
        negatives.add((min(i, nearest), max(i, nearest)))
    return {(a, b) for a, b in positives if a != b}, negatives


def column(*values: float) -> Tensor:
    return torch.tensor([[value] for value in values])


@pytest.mark.parametrize(
    ("embeddings", "labels", "positives", "negatives"),
    [
        (
            column(0.0, 1, 4, 5, 9, 11),
            [0, 0, 0, 1, 1, 1],
            {(0, 2), (1, 2), (3, 4), (3, 5)},
            {(0, 3), (1, 3), (2, 3), (2, 4), (2, 5)},
        ),
        (column(0.0, 1, 5), [0, 0, 1], {(0, 1)}, {(0, 2), (1, 2)}),
        (column(0.0, 0, 5, 7), [0, 0, 1, 1], {(0, 1), (2, 3)}, {(0, 2), (1, 2), (0, 3)}),
    ],
)
def test_hard_pairs_conformance_case_8_gives_oml_pairs_without_self_pairs(
    embeddings: Tensor, labels: list[int], positives: PairSet, negatives: PairSet
) -> None:
    assert as_sets(hard_pairs(embeddings, torch.tensor(labels))) == (positives, negatives)


@pytest.mark.parametrize("seed", range(50))
def test_miner_random_batches_equal_the_brute_force_definition(seed: int) -> None:
    random = np.random.RandomState(seed)
    labels = random.randint(0, 5, 24).tolist()
    # Small integers in every second batch: many equal distances and duplicates.
    points = random.randint(0, 3, (24, 2)) if seed % 2 else random.randn(24, 8)
    embeddings = torch.from_numpy(points.astype(np.float32))
    assert as_sets(hard_pairs(embeddings, torch.tensor(labels))) == brute_force(embeddings.tolist(), labels)


def test_hard_pairs_are_sorted_positives_first() -> None:
    embeddings = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    ids1, ids2, is_negative = hard_pairs(embeddings, torch.arange(30) % 6)
    assert (ids1.dtype, ids2.dtype, is_negative.dtype) == (torch.int64, torch.int64, torch.bool)
    rows = list(zip(is_negative.tolist(), ids1.tolist(), ids2.tolist(), strict=True))
    assert rows == sorted(rows)


def test_miner_batch_of_one_label_is_bad_input() -> None:
    with pytest.raises(BadInput, match="fewer than two labels"):
        hard_pairs(column(0.0, 1, 10, 12), torch.zeros(4, dtype=torch.int64))


def test_hard_pairs_carry_no_gradient_and_accept_embeddings_that_do() -> None:
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids1, _, _ = hard_pairs(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert len(ids1) > 0
    assert not ids1.requires_grad
