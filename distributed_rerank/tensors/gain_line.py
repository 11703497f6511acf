"""A gain as a line over the value before: what other queries, easier or harder ones, may expect."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from distributed_rerank.tensors.statistics import Interval, student_t_quantile


@dataclass(frozen=True)
class GainLine:
    """A gain as a line over the value before, through the means of the queries that it was fitted to."""

    before: float
    gain: float
    slope: float
    gain_variance: float
    covariance: float
    slope_variance: float
    n_clusters: int

    def at(self, before: float, level: float = 0.95) -> Interval:
        """The gain for other queries with this mean before, by Student's t with clusters - 1 degrees of freedom."""
        x = before - self.before
        mean = self.gain + self.slope * x
        variance = max(0.0, self.gain_variance + 2 * x * self.covariance + x * x * self.slope_variance)
        half = student_t_quantile((1 + level) / 2, float(self.n_clusters - 1)) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half)


def gain_line(
    before: Float64[Tensor, " query"], after: Float64[Tensor, " query"], clusters: Int64[Tensor, " query"]
) -> GainLine | None:
    """The least-squares line of the queries' gain, after - before, over their value before; clusters are labels.

    Variances are those of a sample of clusters (the sandwich of Liang and Zeger 1986). Level where all values before
    are equal; None for a single cluster.
    """
    _, rows, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    n_clusters, n = len(sizes), len(before)
    if n_clusters < 2:
        return None
    gain = after - before
    middle, mean = math.fsum(before.tolist()) / n, math.fsum(gain.tolist()) / n
    x = before - middle
    squares = math.fsum((x**2).tolist())
    slope = math.fsum((x * gain).tolist()) / squares if squares else 0.0
    # [query] what the line leaves over; [cluster, 2] by how much each cluster moves its height and its slope.
    rest = gain - mean - slope * x
    moves = torch.stack([rest / n, x * rest / squares if squares else torch.zeros_like(rest)], dim=1)
    of_clusters = torch.zeros(n_clusters, 2, dtype=torch.float64).index_add_(0, rows, moves)
    height, both, of_slope = (
        math.fsum((of_clusters[:, a] * of_clusters[:, b]).tolist()) * n_clusters / (n_clusters - 1)
        for a, b in ((0, 0), (0, 1), (1, 1))
    )
    return GainLine(middle, mean, slope, height, both, of_slope, n_clusters)
