"""What unlabelled queries are expected to reach, from queries that are labelled, and whether the two are alike.

A curve learns from labelled queries how often the first place is right, given three signals of a query's final list:
the distance of the first candidate, and how far the second one and the mean of the others are behind it. Its mean over
the unlabelled queries is the estimate. Its variance has three parts, all by label, because queries of one label fail
together: of the curve (a jackknife that leaves labels out), of what the curve does not explain, and of which labels are
asked for.

All of it holds for queries that are asked like the labelled ones: of one gallery, with about as many queries a label.
`drift` tests that they look alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import columns
from distributed_rerank.tensors.statistics import Interval, multinomial_draws, student_t_quantile

N_FOLDS = 25
"""Groups of labels, each left out in turn."""
N_BINS = 20
"""Bins of a signal, with equally many labelled queries each, that `drift` compares."""
RIDGE = 1.0
"""Pull of the curve's slopes towards 0, in units of the standardised signals: as if one query more had been seen."""

Signals = Float64[Tensor, "query signal"]


@dataclass(frozen=True)
class LabelledSample:
    """Queries whose answers are known."""

    signals: Signals
    values: Float64[Tensor, "query metric"]
    """Between 0 and 1, such as whether the first place is right."""
    clusters: Int64[Tensor, " query"]
    """The label of each query, as a number."""


def signals_of(distances: Float[Tensor, "query k"]) -> Signals:
    """The signals of final lists, nearest first; inf = no candidate.

    A list without a second candidate looks as if it were as far behind as that of any query.
    """
    first = distances[:, :1].double()
    behind = (distances[:, 1:].double() - first).nan_to_num(nan=torch.inf, posinf=torch.inf)
    is_there = behind.isfinite()
    largest = float(behind[is_there].max()) if bool(is_there.any()) else 0.0
    count = is_there.sum(dim=1, keepdim=True)
    rest = torch.where(is_there, behind, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    second = torch.where(is_there, behind, largest)[:, :1] if behind.shape[1] else torch.full_like(first, largest)
    return torch.cat([first, second, torch.where(count > 0, rest, largest)], dim=1)


def expected_values(sample: LabelledSample, signals: Signals, *, level: float = 0.95) -> list[Interval]:
    """The expected mean of each metric over the unlabelled queries, with an interval for their true mean.

    The interval is symmetric in log-odds, with Student's t for the number of labels. Raises BadInput for a sample of
    fewer than two labels, and for no queries.
    """
    sizes, rows = _labels_of(sample.clusters)
    n_labels = len(sizes)
    if n_labels < 2 or not len(signals):
        raise BadInput(
            f"{n_labels} labels with {len(sample.values)} queries say nothing of {len(signals)} queries; "
            "give an evaluation of more labels"
        )
    # [label] -> fold: labels in ascending order take turns.
    folds = (torch.arange(n_labels) % min(N_FOLDS, n_labels))[rows]
    # How many labels the unlabelled queries have, if each has as many queries as in the sample.
    n_asked = min(len(signals), max(1.0, len(signals) * n_labels / len(rows)))
    t = student_t_quantile((1 + level) / 2, float(n_labels - 1))
    found = []
    for values in sample.values.unbind(dim=1):
        mean, of_curve, residuals = _cross_fitted(sample.signals, values, folds, signals)
        spread = (_variance_of_label(residuals, rows, sizes) + _variance_of_label(values, rows, sizes)) / n_asked
        inside = min(max(mean, 1e-3), 1 - 1e-3)
        centre, width = math.log(inside / (1 - inside)), t * math.sqrt(of_curve + spread) / (inside * (1 - inside))
        found.append(Interval(mean, _sigmoid(centre - width), _sigmoid(centre + width)))
    return found


def drift(sample: LabelledSample, signals: Signals, *, seed: int, n_resamples: int = 2000) -> float:
    """How probably the unlabelled queries' signals differ as much as they do if they are asked like the labelled ones.

    A two-sample Kolmogorov-Smirnov test on the binned signals, the largest of all. What chance does is found by drawing
    labels of the sample with replacement, on either side; single queries would raise an alarm wherever labels change.
    """
    sizes, rows = _labels_of(sample.clusters)
    n_labels = len(sizes)
    # More than four times as many labels change nothing that chance does, and take memory.
    n_asked = max(1, min(len(signals), round(len(signals) * n_labels / len(rows)), 4 * n_labels))
    steps = torch.arange(1, N_BINS, dtype=torch.float64) / N_BINS
    # Of each signal, [label, bin] counts of the sample and [bin] counts of the unlabelled queries.
    binned = []
    for known, new in zip(sample.signals.unbind(dim=1), signals.unbind(dim=1), strict=True):
        edges = torch.quantile(known, steps).unique()
        cells = rows * (len(edges) + 1) + torch.bucketize(known.contiguous(), edges, right=True)
        counts = torch.bincount(cells, minlength=n_labels * (len(edges) + 1)).view(n_labels, -1).double()
        others = torch.bincount(torch.bucketize(new.contiguous(), edges, right=True), minlength=len(edges) + 1).double()
        binned.append((counts, others))
    ours, theirs = (
        multinomial_draws(n_labels, n_resamples, seed=seed + side, n_drawn=n_drawn)
        for side, n_drawn in enumerate((n_labels, n_asked))
    )
    # [resample] for each signal: the gaps that chance makes. All see the same draws, some of which are in memory.
    null = columns.join(
        n_resamples,
        (
            {signal: _gap(a @ counts, b @ counts) for signal, (counts, _) in enumerate(binned)}
            for a, b in zip(ours, theirs, strict=True)
        ),
    )
    seen, by_chance = [], []
    for signal, (counts, others) in enumerate(binned):
        scale = float(null[signal].mean()) or 1.0
        seen.append(float(_gap(counts.sum(dim=0), others)) / scale)
        by_chance.append(null[signal] / scale)
    as_large = int((torch.stack(by_chance).amax(dim=0) >= max(seen)).sum())
    return (1 + as_large) / (1 + n_resamples)


def _gap(a: Float64[Tensor, "... bin"], b: Float64[Tensor, "... bin"]) -> Float64[Tensor, "..."]:
    """Largest difference of the two cumulative distributions."""
    shares = [side.cumsum(dim=-1) / side.sum(dim=-1, keepdim=True) for side in (a, b)]
    return (shares[0] - shares[1]).abs().amax(dim=-1)


def _labels_of(clusters: Int64[Tensor, " query"]) -> tuple[Float64[Tensor, " label"], Int64[Tensor, " query"]]:
    """Number of queries of each label, and the label of each query, from 0."""
    _, rows, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    return sizes.double(), rows


def _cross_fitted(
    known: Signals,
    values: Float64[Tensor, " query"],
    folds: Int64[Tensor, " query"],
    asked: Float64[Tensor, "asked signal"],
) -> tuple[float, float, Float64[Tensor, " query"]]:
    """The estimate, the variance of its curve, and what curves of the other folds leave unexplained."""
    mean = float(_fit(known, values)(asked).mean())
    means, residuals = [], torch.empty_like(values)
    n_folds = int(folds.max()) + 1
    for fold in range(n_folds):
        is_out = folds == fold
        curve = _fit(known[~is_out], values[~is_out])
        means.append(float(curve(asked).mean()))
        residuals[is_out] = values[is_out] - curve(known[is_out])
    average = math.fsum(means) / n_folds
    return mean, (n_folds - 1) / n_folds * math.fsum((m - average) ** 2 for m in means), residuals


def _variance_of_label(
    values: Float64[Tensor, " query"], rows: Int64[Tensor, " query"], sizes: Float64[Tensor, " label"]
) -> float:
    """Variance of the mean over the queries of one label; large labels count more, as in a mean over queries."""
    sums = torch.zeros_like(sizes).index_add_(0, rows, values - values.mean())
    return float((sums**2).sum()) / (len(sizes) - 1) / float(sizes.mean()) ** 2


def _fit(signals: Signals, values: Float64[Tensor, " query"]) -> Callable[[Signals], Float64[Tensor, " query"]]:
    """The logistic curve of the signals that fits the values best, by Newton's method with small slopes preferred."""
    centre, spread = signals.mean(dim=0), signals.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)

    def features(of: Tensor) -> Tensor:
        # The intercept, and the signals in units of the known ones; none lies further out than ten deviations.
        return torch.cat([torch.ones(len(of), 1).double(), ((of - centre) / spread).clamp(-10, 10)], dim=1)

    x = features(signals)
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    pull = torch.full_like(weights, RIDGE)
    pull[0] = 1e-6
    for _ in range(50):
        # Gradient [feature] and second derivatives [feature, feature] of the loss; a step is at most 2 in each.
        p = (x @ weights).sigmoid()
        gradient = x.T @ (p - values) + pull * weights
        step = torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + pull.diag(), gradient).clamp(-2, 2)
        weights = weights - step
        if float(step.abs().max()) < 1e-9:
            break
    return lambda of: (features(of) @ weights).sigmoid()


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0
