"""Halves by label: whole labels, half of them, and the bits that earlier releases drew."""

import numpy as np
import pytest
import torch

from distributed_rerank.tensors.label_split import half_of_labels


@pytest.mark.parametrize("seed", range(10))
def test_half_of_labels_is_what_each_of_its_callers_drew_before_they_shared_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = torch.from_numpy(generator.choice(10**6, 31)[generator.integers(0, 31, 200)])
    permuted = np.random.default_rng([seed, 0xADA]).permutation(np.unique(labels.numpy()))
    wanted = np.isin(labels.numpy(), permuted[: len(permuted) // 2])
    half = half_of_labels(labels, np.random.default_rng([seed, 0xADA]).permutation)
    assert half.tolist() == wanted.tolist()
    known = labels.unique()
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    half = half_of_labels(labels, lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(half, torch.isin(labels, known[order][: len(known) // 2]))


def test_half_of_labels_has_whole_labels_and_rounds_down() -> None:
    labels = torch.tensor([5, 5, 9, 9, 9, 2, 7, 2, 11])
    half = half_of_labels(labels, np.random.default_rng(0).permutation)
    assert len(labels[half].unique()) == 2
    assert not set(labels[half].tolist()) & set(labels[~half].tolist())
    assert not half_of_labels(torch.tensor([4, 4]), np.random.default_rng(0).permutation).any()
