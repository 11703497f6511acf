"""Expected quality without labels: against planted truth, plain loops and scipy."""

import numpy as np
import pytest
import scipy.stats
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.expected import LabelledSample, drift, expected_values, signals_of
from distributed_rerank.tensors.statistics import student_t_quantile


def draw(
    n_labels: int, n_images: int, seed: int, shift: float = 0.0, unseen: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Final lists of queries, whether their first place is right, and labels; labels differ in how hard they are.

    With `shift` all first candidates are further away and as much less often right: the curve is the same. `unseen` is
    how much labels differ in what no distance shows.
    """
    state = np.random.default_rng(seed)
    label = np.repeat(np.arange(n_labels), n_images)
    hard = state.normal(size=n_labels)[label] * 0.7
    first = state.normal(size=len(label)) + hard + shift
    is_right = state.random(len(label)) < 1 / (
        1 + np.exp(1.5 * first - 1.5 + unseen * state.normal(size=n_labels)[label])
    )
    behind = np.sort(np.abs(state.normal(size=(len(label), 4))), axis=1)
    return np.concatenate([first[:, None], first[:, None] + behind], axis=1), is_right.astype(float), label


def sample_of(lists: np.ndarray, values: np.ndarray, label: np.ndarray) -> LabelledSample:
    return LabelledSample(
        signals_of(torch.from_numpy(lists)), torch.from_numpy(values)[:, None], torch.from_numpy(label)
    )


def test_signals_are_distance_and_lead_over_the_second_and_the_rest() -> None:
    found = signals_of(torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.6, torch.inf], [0.4, torch.inf, torch.inf]]))
    expected = [[0.1, 0.2, 0.3], [0.2, 0.4, 0.4], [0.4, 0.4, 0.4]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_interval_covers_what_labels_would_have_shown(shift: float) -> None:
    covered, errors, blind = [], [], []
    for seed in range(25):
        lists, values, label = draw(30, 12, seed)
        others, truth, _ = draw(30, 12, seed + 1000, shift)
        (found,) = expected_values(sample_of(lists, values, label), signals_of(torch.from_numpy(others)))
        covered.append(found.low <= truth.mean() <= found.high)
        errors.append(found.mean - truth.mean())
        blind.append(values.mean() - truth.mean())
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert found.high - found.low < 0.35
    assert np.mean(covered) >= 0.9
    assert abs(np.mean(errors)) < 0.02
    if shift:  # the rate of the labelled queries itself would promise far too much
        assert np.mean(blind) > 0.1


def test_probabilities_that_promise_too_much_are_put_right() -> None:
    """The same signals, other labels: what counts is how often the first place was right, not what was promised."""
    lists, values, label = draw(40, 10, 0)
    rarely = values * (np.random.default_rng(1).random(len(values)) < 0.3)
    (found,) = expected_values(sample_of(lists, rarely, label), signals_of(torch.from_numpy(lists)))
    assert found.mean == pytest.approx(rarely.mean(), abs=0.005)


def test_one_label_says_nothing() -> None:
    lists, values, label = draw(1, 8, 0)
    with pytest.raises(BadInput, match="1 labels with 8 queries"):
        expected_values(sample_of(lists, values, label), signals_of(torch.from_numpy(lists)))


def test_alarm_is_rare_for_other_labels_and_sure_for_drift() -> None:
    by_chance, found = [], []
    for seed in range(100):
        lists, values, label = draw(30, 12, seed)
        sample = sample_of(lists, values, label)
        others = [signals_of(torch.from_numpy(draw(30, 12, seed + 1000, shift)[0])) for shift in (0.0, 2.0)]
        by_chance.append(drift(sample, others[0], seed=0, n_resamples=500))
        found.append(drift(sample, others[1], seed=0, n_resamples=500))
    assert np.mean(np.array(by_chance) < 0.01) <= 0.03
    assert np.mean(np.array(by_chance) < 0.5) == pytest.approx(0.5, abs=0.13)
    assert np.mean(np.array(found) < 0.01) > 0.97


def test_single_queries_as_clusters_agree_with_scipy() -> None:
    """Without labels in common the test is the ordinary one; only the bins make it coarser."""
    state = np.random.default_rng(0)
    for shift in (0.05, 0.12, 0.2):
        known, new = state.normal(size=(400, 1)), state.normal(size=(400, 1)) + shift
        sample = LabelledSample(torch.from_numpy(known), torch.zeros(400, 1).double(), torch.arange(400))
        expected = scipy.stats.ks_2samp(known[:, 0], new[:, 0]).pvalue
        found = drift(sample, torch.from_numpy(new), seed=0)
        assert found == pytest.approx(expected, rel=0.6, abs=0.03)


def test_quantile_is_that_of_scipy() -> None:
    for freedom in (1.0, 2.0, 9.0, 80.0):
        for probability in (0.5, 0.9, 0.975, 0.9995):
            expected = scipy.stats.t.ppf(probability, freedom)
            assert student_t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-5)


def test_many_queries_of_few_labels_are_beyond_it() -> None:
    """The stated limit: queries of three labels, asked as if they were of many, vary more than the interval says."""
    covered = []
    for seed in range(25):
        lists, values, label = draw(30, 12, seed, unseen=2.0)
        others, truth, _ = draw(3, 120, seed + 1000, unseen=2.0)
        (found,) = expected_values(sample_of(lists, values, label), signals_of(torch.from_numpy(others)))
        covered.append(found.low <= truth.mean() <= found.high)
    assert 0.3 < np.mean(covered) < 0.9, covered
