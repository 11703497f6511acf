"""Suspected labels against planted ones; the choice of queries against a plain loop."""

import numpy as np
import pytest
import torch

from distributed_rerank.tensors.suspects import evidence_of_labels, most_uncertain, precision_of_suspects


def planted(
    seed: int, share: float, n_labels: int = 60, n_images: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours' labels and own labels of images, some of them wrong, and which; each pair of labels looks alike."""
    state = np.random.default_rng(seed)
    truth = np.repeat(np.arange(n_labels), n_images)
    centres = np.repeat(state.normal(size=(n_labels // 2, 16)), 2, axis=0) + 0.25 * state.normal(size=(n_labels, 16))
    x = centres[truth] + 0.35 * state.normal(size=(len(truth), 16))
    is_wrong = state.random(len(truth)) < share
    # A wrong label is that of the twin, or any.
    other = np.where(state.random(len(truth)) < 0.5, truth ^ 1, state.integers(0, n_labels, len(truth)))
    label = np.where(is_wrong, other, truth)
    is_wrong = label != truth
    distances = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return label[distances.argsort(axis=1)[:, :10]], label, is_wrong


def judged(neighbours: np.ndarray, label: np.ndarray, prior: float) -> np.ndarray:
    weights = torch.ones(neighbours.shape)
    own, other, _ = evidence_of_labels(weights, torch.from_numpy(neighbours), torch.from_numpy(label))
    return precision_of_suspects(own, other, prior).numpy()


def test_evidence_is_that_of_a_loop() -> None:
    state = np.random.default_rng(0)
    labels, own_labels = state.integers(-1, 4, (50, 7)), state.integers(0, 4, 50)
    weights = state.integers(1, 8, (50, 7)) / 8
    own, other, label = evidence_of_labels(*(torch.from_numpy(a) for a in (weights, labels, own_labels)))
    for row in range(50):
        sums = {}
        for value, weight in zip(labels[row], weights[row], strict=True):
            if value >= 0:
                sums[int(value)] = sums.get(int(value), 0.0) + weight
        assert own[row] == sums.pop(int(own_labels[row]), 0.0)
        best = max(sums, key=lambda value: sums[value], default=-1)
        assert (int(label[row]), float(other[row])) == (best, sums.get(best, 0.0))


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_estimated_precision_is_that_of_planted_labels(share: float) -> None:
    estimated, right, wrong_above = [], [], []
    for seed in range(6):
        neighbours, label, is_wrong = planted(seed, share)
        found = judged(neighbours, label, share)
        order = np.argsort(-found, kind="stable")
        top = order[: int(is_wrong.sum())]
        estimated.append(found[top].min())
        right.append(is_wrong[top].mean())
        wrong_above.append(np.mean(found[is_wrong][:, None] > found[~is_wrong][None]))
        assert np.all(np.diff(found[order]) <= 0)
    assert np.mean(right) > 0.6
    # It errs on the careful side: the suspects that there are count against each other.
    assert np.mean(right) - 0.25 < np.mean(estimated) < np.mean(right) + 0.05
    assert np.mean(wrong_above) > 0.9


def test_look_alikes_alone_are_no_mislabels() -> None:
    """Without a wrong label many images have a near neighbour of another label, and hardly any is accused."""
    neighbours, label, _ = planted(0, 0.0)
    assert (neighbours[:, :3] != label[:, None]).any(axis=1).mean() > 0.2
    found = judged(neighbours, label, 0.01)
    assert (found > 0.6).mean() < 0.01
    assert found.mean() < 0.03


def test_uncertain_queries_are_of_many_groups() -> None:
    state = np.random.default_rng(0)
    certainty, group = state.integers(0, 20, 60) / 20, state.integers(0, 9, 60)
    order = sorted(range(60), key=lambda query: (certainty[query], query))
    seen: dict[int, int] = {}
    rounds = []
    for query in order:
        seen[group[query]] = seen.get(group[query], -1) + 1
        rounds.append((seen[group[query]], query))
    expected = [query for _, query in sorted(rounds, key=lambda pair: pair[0])][:25]
    found = most_uncertain(torch.from_numpy(certainty), torch.from_numpy(group), 25)
    assert found.tolist() == expected
    assert len(set(group[found.numpy()[:9]])) == len(set(group))
