"""The sides of the train labels: whole labels, look-alikes together."""

import numpy as np
import pytest

from distributed_rerank.errors import BadInput
from distributed_rerank.training.sides import set_aside_labels, sides


def test_set_aside_labels_are_whole_labels_of_the_share_asked_for() -> None:
    labels = np.repeat(np.arange(20), 3)
    labels[::17] = -1
    aside = set_aside_labels(labels, 0.25, seed=5)
    assert len(np.unique(labels[aside])) == 5
    assert not set(labels[aside]) & set(labels[~aside])
    assert not np.array_equal(aside, set_aside_labels(labels, 0.25, seed=6))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_one_group_of_labels_after_the_other_is_set_aside_and_one_at_most_is_split(share: float) -> None:
    labels = np.repeat(np.arange(40), 3)
    groups = np.random.default_rng(0).integers(0, 10, 40)
    aside = set_aside_labels(labels, share, 5, groups)
    is_aside = aside[::3]
    assert is_aside.sum() == round(40 * share)
    assert not set(labels[aside]) & set(labels[~aside])
    split = set(groups[is_aside]) & set(groups[~is_aside])
    assert len(split) <= 1
    assert not np.array_equal(aside, set_aside_labels(labels, share, 6, groups))


def test_labels_of_one_image_stay_with_their_group() -> None:
    """Each group has two labels of three images and two of one, so prefixes of either kind hold the same groups."""
    labels = np.concatenate([np.repeat(np.arange(20), 3), np.arange(20, 40)])
    groups = np.tile(np.repeat(np.arange(10), 2), 2)
    half = sides(labels, 0.5, 3, groups)
    for group in range(10):
        assert len(set(half[np.isin(labels, np.flatnonzero(groups == group))])) == 1


def test_halves_leave_unlabelled_items_out() -> None:
    labels = np.array([0, 0, 1, 1, -1, 2, 2, 3, 3])
    half = sides(labels, 0.5, seed=0)
    assert half[4] == -1
    assert sorted(np.bincount(half[half >= 0])) == [4, 4]


@pytest.mark.parametrize(("n_labels", "expected"), [(8, 3), (20, 8), (40, 16), (60, 16), (100, 25)])
def test_without_a_share_few_labels_set_more_aside(n_labels: int, expected: int) -> None:
    labels = np.repeat(np.arange(n_labels), 3)
    aside = set_aside_labels(labels, None, seed=5)
    assert len(np.unique(labels[aside])) == expected


def test_set_aside_of_too_few_labels_is_refused() -> None:
    with pytest.raises(BadInput, match="3 train labels"):
        set_aside_labels(np.repeat(np.arange(3), 2), 0.25, seed=0)
