"""Calibration against scikit-learn's logistic regression, a literal ECE and planted probabilities."""

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import calibration


def planted_pairs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(n, generator=generator) * 2
    p = (3.0 - 4.0 * distances.double()).sigmoid()
    return distances, torch.rand(n, generator=generator).double() < p, p


def test_fit_logistic_planted_curve_is_found_again() -> None:
    distances, is_match, _ = planted_pairs(200_000, seed=0)
    curve = calibration.fit_logistic(distances, is_match)
    assert curve.slope == pytest.approx(4, abs=0.1)
    assert curve.intercept == pytest.approx(3, abs=0.1)


def test_fit_logistic_equals_sklearn_without_penalty() -> None:
    distances, is_match, _ = planted_pairs(20_000, seed=1)
    curve = calibration.fit_logistic(distances, is_match)
    theirs = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000)
    theirs.fit(distances.double().numpy()[:, None], is_match.numpy())
    # Platt's smoothed targets move the curve by about 1 / n.
    assert curve.slope == pytest.approx(-theirs.coef_[0, 0], rel=2e-3)
    assert curve.intercept == pytest.approx(theirs.intercept_[0], rel=2e-3)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e5])
def test_fit_logistic_other_unit_of_distance_gives_the_same_probabilities(factor: float) -> None:
    distances, is_match, _ = planted_pairs(3000, seed=2)
    wanted = calibration.probability(distances, calibration.fit_logistic(distances, is_match))
    scaled = distances.double() * factor
    found = calibration.probability(scaled, calibration.fit_logistic(scaled, is_match))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_fit_logistic_gradient_is_zero_at_the_answer() -> None:
    distances, is_match, _ = planted_pairs(500, seed=3)
    curve = calibration.fit_logistic(distances, is_match)
    n_match, n_other = int(is_match.sum()), int((~is_match).sum())
    target = torch.where(is_match, (n_match + 1) / (n_match + 2), 1 / (n_other + 2)).double()
    error = calibration.probability(distances, curve) - target
    assert abs(error.mean().item()) < 1e-8
    assert abs((error * distances.double()).mean().item()) < 1e-8


def test_fit_logistic_separable_pairs_stay_finite_and_ordered() -> None:
    distances = torch.cat([torch.linspace(0, 1, 50), torch.linspace(5, 6, 500)])
    curve = calibration.fit_logistic(distances, torch.arange(550) < 50)
    p = calibration.probability(distances, curve)
    assert math.isfinite(curve.slope)
    assert p[:50].min() > 0.9
    assert p[50:].max() < 0.1


def test_fit_logistic_equal_distances_give_the_base_rate() -> None:
    curve = calibration.fit_logistic(torch.ones(400), torch.arange(400) < 100)
    assert curve.slope == 0
    p = calibration.probability(torch.tensor([1.0, torch.inf]), curve)
    assert p.tolist() == pytest.approx([0.25, 0.25], abs=0.01)


def test_fit_logistic_one_kind_of_pairs_or_missing_candidates_is_refused() -> None:
    with pytest.raises(BadInput, match="0 matches and 3 others"):
        calibration.fit_logistic(torch.arange(3.0), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(BadInput, match="finite"):
        calibration.fit_logistic(torch.tensor([1.0, torch.inf]), torch.tensor([True, False]))


def test_probability_missing_candidate_is_zero_and_shape_is_kept() -> None:
    curve = calibration.Logistic(slope=2.0, intercept=1.0)
    p = calibration.probability(torch.tensor([[0.5, torch.inf], [0.0, 1.0]]), curve)
    assert p.tolist() == [[0.5, 0.0], pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])]


def test_reliability_equals_sklearn_calibration_curve() -> None:
    _, is_match, p = planted_pairs(5000, seed=5)
    found = calibration.reliability(p, is_match, 10)
    rates, means = calibration_curve(is_match.numpy(), p.numpy(), n_bins=10)
    is_used = found.counts > 0
    assert int(found.counts.sum()) == 5000
    np.testing.assert_allclose(found.match_rates[is_used], rates)
    np.testing.assert_allclose(found.mean_probabilities[is_used], means)


def test_expected_calibration_error_equals_literal_definition() -> None:
    p = torch.tensor([0.05, 0.10, 0.95, 1.0, 0.55])
    is_match = torch.tensor([False, True, True, True, False])
    wanted = (2 * abs(0.5 - 0.075) + 2 * abs(1 - 0.975) + abs(0 - 0.55)) / 5
    assert calibration.expected_calibration_error(p, is_match, 2 * 2) == pytest.approx(wanted, abs=1e-6)


def test_expected_calibration_error_falls_after_the_fit() -> None:
    distances, is_match, p = planted_pairs(20_000, seed=6)
    raw = 1 - distances / 2
    fitted = calibration.probability(distances, calibration.fit_logistic(distances, is_match))
    before, after = (calibration.expected_calibration_error(values, is_match) for values in (raw, fitted))
    assert after < 0.02 < before
    assert calibration.expected_calibration_error(p, is_match) < 0.02
