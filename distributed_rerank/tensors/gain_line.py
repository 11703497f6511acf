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
        """The gain for other queries with this mean before, by Student's t; the line takes two degrees of freedom."""
        x = before - self.before
        mean = self.gain + self.slope * x
        variance = max(0.0, self.gain_variance + 2 * x * self.covariance + x * x * self.slope_variance)
        half = student_t_quantile((1 + level) / 2, float(max(1, self.n_clusters - 2))) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half)


def gain_line(
    before: Float64[Tensor, " query"], after: Float64[Tensor, " query"], clusters: Int64[Tensor, " query"]
) -> GainLine | None:
    """The least-squares line of the queries' gain, after - before, over their value before; clusters are labels.

    Variances are those of the jackknife that leaves one cluster out (Bell and McCaffrey 2002): with few clusters the
    plain sandwich is too sure of a line that one of them holds up. Level where all values before are equal; None for a
    single cluster.
    """
    _, rows, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    n_clusters = len(sizes)
    if n_clusters < 2:
        return None
    middle, gain = math.fsum(before.tolist()) / len(before), after - before
    x = before - middle
    # [query, 5] what the sums of a least-squares line are made of; [cluster, 5] those of each cluster.
    moments = torch.stack([torch.ones_like(x), x, x**2, gain, x * gain], dim=1)
    of_clusters = torch.zeros(n_clusters, 5, dtype=torch.float64).index_add_(0, rows, moments)
    total = torch.tensor([math.fsum(column.tolist()) for column in moments.T], dtype=torch.float64)
    # [2] the height in the middle and the slope; [cluster, 2] by how much they move where a cluster is left out.
    line = least_squares(total)
    moves = least_squares(total - of_clusters) - line
    height, both, of_slope = (
        math.fsum((moves[:, a] * moves[:, b]).tolist()) * (n_clusters - 1) / n_clusters
        for a, b in ((0, 0), (0, 1), (1, 1))
    )
    return GainLine(middle, float(line[0]), float(line[1]), height, both, of_slope, n_clusters)


def least_squares(sums: Float64[Tensor, "... 5"]) -> Float64[Tensor, "... 2"]:
    """Height at x = 0 and slope of the line of y over x from the sums of 1, x, x x, y and x y; level for equal x."""
    n, x, squares, y, products = sums.unbind(-1)
    spread = squares - x**2 / n
    # What is left of equal values by rounding is no spread.
    differs = spread > 1e-12 * squares
    slope = torch.where(differs, (products - x * y / n) / torch.where(differs, spread, 1.0), 0.0)
    return torch.stack([(y - slope * x) / n, slope], dim=-1)
