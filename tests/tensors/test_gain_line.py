"""The line of a gain: numpy's least squares, and an interval that covers what other queries of the same kind gain."""

import numpy as np
import pytest
import torch
from scipy import stats

from distributed_rerank.tensors.gain_line import GainLine, gain_line
from distributed_rerank.tensors.statistics import Interval


def planted(state: np.random.Generator, n_labels: int, level: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before, after and labels of six queries a label: gain 0.4 - 0.35 before, with labels that gain more or less."""
    labels = np.repeat(np.arange(n_labels), 6)
    before = (level + 0.2 * state.normal(size=n_labels)[labels] + 0.15 * state.normal(size=len(labels))).clip(0, 1)
    gain = 0.4 - 0.35 * before + 0.06 * state.normal(size=n_labels)[labels] + 0.1 * state.normal(size=len(labels))
    return torch.from_numpy(before), torch.from_numpy(before + gain), torch.from_numpy(labels)


def test_line_is_that_of_numpy_and_its_variances_those_of_leaving_labels_out() -> None:
    before, after, labels = planted(np.random.default_rng(0), 14, 0.6)
    found = gain_line(before, after, labels)
    assert found is not None
    x, y, label = before.numpy(), (after - before).numpy(), labels.numpy()
    slope, intercept = np.polyfit(x, y, 1)
    np.testing.assert_allclose([found.slope, found.gain - found.slope * found.before], [slope, intercept], rtol=1e-9)
    for at in (0.2, 0.6, 0.9):
        interval = found.at(at)
        without = np.array([np.polyval(np.polyfit(x[label != n], y[label != n], 1), at) for n in range(14)])
        mean = intercept + slope * at
        spread = np.sqrt(13 / 14 * ((without - mean) ** 2).sum())
        np.testing.assert_allclose(interval.mean, mean, rtol=1e-9)
        np.testing.assert_allclose(interval.high - interval.mean, stats.t.ppf(0.975, 12) * spread, rtol=1e-6)


def test_interval_covers_the_gain_of_harder_queries_where_the_gain_itself_would_not() -> None:
    state = np.random.default_rng(1)
    is_covered, by_gain_alone = [], []
    for _ in range(200):
        before, after, labels = planted(state, 16, 0.75)
        found = gain_line(before, after, labels)
        assert found is not None
        others, theirs, _ = planted(state, 4000, 0.5)
        shown = float((theirs - others).mean())
        interval = found.at(float(others.mean()))
        is_covered.append(interval.low <= shown <= interval.high)
        at_home = found.at(found.before)
        by_gain_alone.append(at_home.low <= shown <= at_home.high)
    assert 0.9 <= np.mean(is_covered) <= 1
    assert np.mean(by_gain_alone) < 0.5


@pytest.mark.parametrize("n_labels", [4, 6, 13])
def test_interval_of_few_labels_covers_what_it_says(n_labels: int) -> None:
    """The sandwich, with one degree of freedom more, covered 86 of 100 with four labels."""
    state = np.random.default_rng(5)
    others, theirs, _ = planted(state, 4000, 0.5)
    shown, is_covered = float((theirs - others).mean()), []
    for _ in range(1000):
        found = gain_line(*planted(state, n_labels, 0.75))
        assert found is not None
        interval = found.at(float(others.mean()))
        is_covered.append(interval.low <= shown <= interval.high)
    # 95 %, but for three standard errors of 1,000 draws, 0.7 points each
    assert np.mean(is_covered) >= 0.93


def test_line_that_one_label_holds_up_is_unsure() -> None:
    """All misses are of one label: without it, nothing is known of how the gain moves."""
    before = torch.tensor([0.0, 0.0] + [1.0] * 10, dtype=torch.float64)
    after = torch.ones(12, dtype=torch.float64)
    found = gain_line(before, after, torch.arange(12) // 2)
    assert found is not None
    assert found.at(0.0).mean == 1
    assert found.at(0.0).low < 0


def test_line_is_level_where_nothing_differs_and_none_for_one_label() -> None:
    values, labels = torch.full((12,), 0.5, dtype=torch.float64), torch.arange(12) // 3
    gain = torch.linspace(0, 0.1, 12, dtype=torch.float64)
    found = gain_line(values, values + gain, labels)
    assert found is not None
    assert found.slope == 0
    assert found.at(0.1) == found.at(0.5)
    np.testing.assert_allclose(found.at(0.5).mean, 0.05)
    assert gain_line(values, values + gain, torch.zeros(12, dtype=torch.int64)) is None


def test_line_of_hits_and_misses_has_the_rates_of_both() -> None:
    """CMC@1 is 0 or 1: a miss is put right in 3 of 4 cases, a hit lost in 1 of 8."""
    before = torch.tensor([0.0] * 4 + [1.0] * 8, dtype=torch.float64)
    after = torch.tensor([1.0, 1, 1, 0] + [1.0] * 7 + [0.0], dtype=torch.float64)
    found = gain_line(before, after, torch.arange(12) % 3)
    assert isinstance(found, GainLine)
    np.testing.assert_allclose([found.at(0.0).mean, found.at(1.0).mean], [0.75, -0.125], atol=1e-12)


def test_no_change_is_none_for_all_others() -> None:
    before, _, labels = planted(np.random.default_rng(3), 5, 0.6)
    found = gain_line(before, before, labels)
    assert found is not None
    assert found.at(0.1) == Interval(0.0, 0.0, 0.0)


def test_line_does_not_depend_on_the_order_of_queries() -> None:
    before, after, labels = planted(np.random.default_rng(2), 9, 0.6)
    order = torch.argsort(labels.flip(0), stable=True)
    mixed = len(labels) - 1 - order
    first, second = gain_line(before, after, labels), gain_line(before[mixed], after[mixed], labels[mixed])
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(list(vars(first).values()), list(vars(second).values()), rtol=1e-12)
