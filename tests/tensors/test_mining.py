"""In-batch pairs against OML's definition by brute force (oml-semantics 1.1 and case 8)."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.mining import PairsMiner, all_pairs, hard_pairs

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


def test_all_pairs_conformance_case_8_gives_6_positives_and_9_negatives() -> None:
    positives, negatives = as_sets(all_pairs(torch.tensor([0, 0, 0, 1, 1, 1])))
    assert (len(positives), len(negatives)) == (6, 9)


@pytest.mark.parametrize("seed", range(50))
def test_miner_random_batches_equal_the_brute_force_definition(seed: int) -> None:
    random = np.random.RandomState(seed)
    labels = random.randint(0, 5, 24).tolist()
    # Small integers in every second batch: many equal distances and duplicates.
    points = random.randint(0, 3, (24, 2)) if seed % 2 else random.randn(24, 8)
    embeddings = torch.from_numpy(points.astype(np.float32))
    pairs = PairsMiner(hard_mining=True).sample(embeddings, labels)
    assert as_sets(pairs) == brute_force(embeddings.tolist(), labels)
    every = {(a, b) for a in range(24) for b in range(a + 1, 24)}
    positives = {(a, b) for a, b in every if labels[a] == labels[b]}
    assert as_sets(PairsMiner(hard_mining=False).sample(embeddings, labels)) == (positives, every - positives)


@pytest.mark.parametrize("hard_mining", [True, False])
def test_miner_output_is_sorted_positives_first_and_the_same_for_every_kind_of_labels(
    hard_mining: bool,
) -> None:
    embeddings = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    labels = [number % 6 for number in range(30)]
    miner = PairsMiner(hard_mining)
    ids1, ids2, is_negative = miner.sample(embeddings, labels)
    assert (ids1.dtype, ids2.dtype, is_negative.dtype) == (torch.int64, torch.int64, torch.bool)
    rows = list(zip(is_negative.tolist(), ids1.tolist(), ids2.tolist(), strict=True))
    assert rows == sorted(rows)
    for other in (torch.tensor(labels), np.array(labels), np.array(labels, dtype=np.int32)):
        assert all(
            torch.equal(a, b) for a, b in zip((ids1, ids2, is_negative), miner.sample(embeddings, other), strict=True)
        )


@pytest.mark.parametrize("hard_mining", [True, False])
def test_miner_batch_of_one_label_is_bad_input(hard_mining: bool) -> None:
    with pytest.raises(BadInput, match="fewer than two labels"):
        PairsMiner(hard_mining).sample(column(0.0, 1, 10, 12), [0] * 4)


def test_hard_pairs_carry_no_gradient_and_accept_embeddings_that_do() -> None:
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids1, _, _ = hard_pairs(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert len(ids1) > 0
    assert not ids1.requires_grad
