"""From a distance to the probability of a match, and how far such probabilities can be trusted.

A logistic curve with two parameters (Platt 1999) is fitted by Newton's method in float64. Sums run in a fixed order, so
the same pairs give the same curve bit for bit.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput


@dataclass(frozen=True)
class Logistic:
    """P(match | distance) = sigmoid(intercept - slope * distance); slope > 0 where small means a match."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability diagram; empty bins have count 0 and both means 0."""

    counts: Int64[Tensor, " bin"]
    mean_probabilities: Float64[Tensor, " bin"]
    match_rates: Float64[Tensor, " bin"]


def fit_logistic(
    distances: Float[Tensor, " pair"], is_match: Bool[Tensor, " pair"], *, max_iterations: int = 100
) -> Logistic:
    """The logistic curve of largest likelihood, with Platt's smoothed targets.

    The targets (n+ + 1) / (n+ + 2) and 1 / (n- + 2) stand for 1 and 0, so the answer is finite even where one distance
    separates all pairs. If all distances are equal the slope is 0. Raises `BadInput` unless there are matches and
    non-matches, all with finite distances.
    """
    n_match = int(is_match.sum())
    n_other = len(is_match) - n_match
    if not n_match or not n_other:
        raise BadInput(f"calibration needs both kinds of pairs, not {n_match} matches and {n_other} others")
    if not bool(torch.isfinite(distances).all()):
        raise BadInput("calibration needs finite distances; drop the missing candidates")
    target = torch.where(is_match, (n_match + 1) / (n_match + 2), 1 / (n_other + 2)).double()
    # Fit on distances of mean 0 and deviation 1, then convert slope and intercept back to the given distances.
    x = distances.double()
    centre = _total(x) / len(x)
    spread = math.sqrt(_total((x - centre).square()) / len(x))
    if spread == 0:
        rate = _total(target) / len(x)
        return Logistic(slope=0.0, intercept=math.log(rate / (1 - rate)))
    gain, offset = _newton((x - centre) / spread, target, max_iterations)
    return Logistic(slope=-gain / spread, intercept=offset - gain * centre / spread)


def probability(distances: Float[Tensor, "..."], curve: Logistic) -> Float64[Tensor, "..."]:
    """Probability of a match for each distance; 0 for a missing candidate (inf) where slope > 0."""
    if curve.slope == 0:
        return torch.full(distances.shape, curve.intercept, dtype=torch.float64).sigmoid()
    return (curve.intercept - curve.slope * distances.double()).sigmoid()


def reliability(
    probabilities: Float[Tensor, " pair"], is_match: Bool[Tensor, " pair"], n_bins: int = 15
) -> Reliability:
    """Number of pairs, mean probability and share of matches in bins of equal width over [0, 1].

    Bin b holds b / n_bins <= p < (b + 1) / n_bins; p = 1 belongs to the last.
    """
    if n_bins < 1:
        raise BadInput(f"n_bins={n_bins} must be at least 1")
    # [pair] the bin of each pair; [bin] the number of pairs in each, at least 1 where it divides.
    p = probabilities.double()
    bins = (p * n_bins).long().clamp(0, n_bins - 1)
    counts = torch.bincount(bins, minlength=n_bins)
    size = counts.clamp(min=1).double()
    return Reliability(
        counts=counts,
        mean_probabilities=torch.bincount(bins, weights=p, minlength=n_bins) / size,
        match_rates=torch.bincount(bins, weights=is_match.double(), minlength=n_bins) / size,
    )


def expected_calibration_error(
    probabilities: Float[Tensor, " pair"], is_match: Bool[Tensor, " pair"], n_bins: int = 15
) -> float:
    """ECE (Guo et al. 2017): mean over pairs of |match rate - mean probability| of their bin in `reliability`."""
    bins = reliability(probabilities, is_match, n_bins)
    gaps = (bins.match_rates - bins.mean_probabilities).abs() * bins.counts.double()
    return math.fsum(gaps.tolist()) / max(1, len(probabilities))


def _newton(x: Float64[Tensor, " pair"], target: Float64[Tensor, " pair"], max_iterations: int) -> tuple[float, float]:
    """Minimiser (gain, offset) of the mean cross-entropy of sigmoid(gain * x + offset)."""
    gain, offset = 0.0, 0.0
    loss = _cross_entropy(x, target, gain, offset)
    for _ in range(max_iterations):
        # Gradient of the loss by gain and offset: error [pair] times x, and error alone. Flat enough means done.
        p = (gain * x + offset).sigmoid()
        error, curvature = p - target, p * (1 - p)
        slope_gain, slope_offset = _total(error * x), _total(error)
        if max(abs(slope_gain), abs(slope_offset)) <= 1e-10 * len(x):
            break
        # Second derivatives [[a, b], [b, c]], the diagonal a little above 0, and their inverse times the gradient.
        a, b, c = _total(curvature * x * x) + 1e-12, _total(curvature * x), _total(curvature) + 1e-12
        determinant = a * c - b * b
        step_gain = (c * slope_gain - b * slope_offset) / determinant
        step_offset = (a * slope_offset - b * slope_gain) / determinant
        # Halve the step until the loss does not rise. Where no step is small enough, the last point is the answer.
        size = 1.0
        while size > 1e-10:
            trial = gain - size * step_gain, offset - size * step_offset
            trial_loss = _cross_entropy(x, target, *trial)
            if trial_loss <= loss:
                break
            size /= 2
        else:
            break
        (gain, offset), loss = trial, trial_loss
    return gain, offset


def _cross_entropy(x: Float64[Tensor, " pair"], target: Float64[Tensor, " pair"], gain: float, offset: float) -> float:
    """Sum over the pairs."""
    logit = gain * x + offset
    return _total(torch.nn.functional.softplus(logit) - target * logit)


def _total(values: Float64[Tensor, " value"]) -> float:
    """The sum from first to last; `Tensor.sum` rounds differently for another number of threads."""
    return float(values.cumsum(dim=0)[-1])
