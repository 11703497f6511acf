"""Is the difference real, and how much more was possible: paired resampling by cluster, ceiling, knee.

Queries of one label share gallery items and looks, so they are not independent: labels, not queries, are the clusters
that are resampled. With a sum per cluster, a resample is one row of a matrix product. The sums are rounded to multiples
of a power of two, so small that no answer shows it and so large that every partial sum is exact: intervals and p-values
are the same bits for any number of threads, and ties in the randomisation test are true ties.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import columns, sharding
from distributed_rerank.tensors.metrics import rows_by_category

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean over queries and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of after - before with its interval, p-value and the numbers of queries that changed."""

    mean: float
    low: float
    high: float
    p_value: float
    n_better: int
    n_worse: int
    n_equal: int
    n_clusters: int


def bootstrap(
    values: Float64[Tensor, "query metric"],
    clusters: Int64[Tensor, " query"] | None,
    *,
    seed: int,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> list[Interval]:
    """Percentile bootstrap interval of the mean over queries of every column.

    `clusters` holds a number per query, in practice its label: whole clusters are drawn with replacement, as many as
    there are, and the mean is that of all drawn queries (Davison and Hinkley 1997, 3.8). None draws single queries (the
    naive interval, too narrow where queries of a label agree). All columns see the same draws. Pass after - before for
    a paired difference. Raises `BadInput` for no queries, no resamples or a level outside (0, 1).
    """
    _check_resampling(len(values), n_resamples)
    if not 0 < level < 1:
        raise BadInput(f"level={level} must lie between 0 and 1")
    # [cluster, metric + 1]: the sum of each metric over the cluster's queries, and in the last column their number.
    sums, sizes = _cluster_sums(values, clusters)
    exact = _round_for_exact_sums(sums, len(sums))
    totals = torch.cat([exact, sizes.double()[:, None]], dim=1)
    # [resample, metric + 1]: the same over all queries drawn. Sum / number is a resampled mean; its quantiles over the
    # resamples are the ends [2, metric] of the intervals.
    blocks = multinomial_draws(len(sums), n_resamples, seed)
    drawn = columns.join(n_resamples, ({"drawn": draws @ totals} for draws in blocks))["drawn"]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    ends = torch.quantile(drawn[:, :-1] / drawn[:, -1:], tails, dim=0)
    means = [math.fsum(column.tolist()) / len(values) for column in values.unbind(dim=1)]
    return [Interval(*numbers) for numbers in zip(means, ends[0].tolist(), ends[1].tolist(), strict=True)]


def sign_flip_p_values(
    differences: Float64[Tensor, "query metric"],
    clusters: Int64[Tensor, " query"] | None,
    *,
    seed: int,
    n_resamples: int = 2000,
) -> list[float]:
    """Two-sided randomisation test of "before and after are exchangeable" for every column of after - before.

    The sign of a whole cluster's sum is flipped at random; p = (1 + resamples with at least the observed |sum|) / (1 +
    n_resamples), so it is never 0. None as `clusters` flips single queries (Fisher's randomisation test as in Smucker
    et al. 2007). With C clusters that changed no p-value is below about 2^(1 - C).
    """
    _check_resampling(len(differences), n_resamples)
    # [cluster, metric]; flipping is one product with signs [resample, cluster], counted block by block.
    sums, _ = _cluster_sums(differences, clusters)
    exact = _round_for_exact_sums(sums, len(sums))
    observed = exact.sum(dim=0).abs()
    n_as_large = torch.zeros(exact.shape[1], dtype=torch.int64)
    for signs in _sign_draws(len(sums), n_resamples, seed):
        n_as_large += ((signs @ exact).abs() >= observed).sum(dim=0)
    return ((1 + n_as_large).double() / (1 + n_resamples)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value for all of them together (Holm 1979): with p < 0.05 none of these is chance, with 95 % probability.

    The smallest is multiplied by their number, the next by one less, and so on; none is below a smaller one's, or
    above 1. The order is kept.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def probability_of_gain(
    change: Float64[Tensor, " query"], clusters: Int64[Tensor, " query"], *, prior_spread: float, prior_clusters: int
) -> float:
    """How probable it is that the mean of after - before is above 0, given these queries; clusters are labels.

    The posterior under a normal model of the clusters' weighted means: flat for the mean; for their spread as if
    `prior_clusters` clusters with the spread `prior_spread` had been seen before. It is Student's t with clusters - 1 +
    prior_clusters degrees of freedom. The mean is not taken to be surer than that of as many queries without clusters:
    few clusters are alike by chance. 0 for a single cluster: one label shows nothing of others.
    """
    _, rows, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    n, n_queries, mean = len(sizes), len(change), math.fsum(change.tolist()) / max(1, len(change))
    if n < 2:
        return 0.0
    rest = torch.zeros(n, dtype=torch.float64).index_add_(0, rows, change - mean) / sizes.double().mean()
    freedom = float(n - 1 + prior_clusters)
    of_clusters = (math.fsum((rest**2).tolist()) + prior_clusters * prior_spread**2) / freedom / n
    of_queries = math.fsum(((change - mean) ** 2).tolist()) / (n_queries - 1) / n_queries
    return student_t_cdf(mean / math.sqrt(max(of_clusters, of_queries)), freedom)


def queries_needed(change: Float64[Tensor, " query"], clusters: Int64[Tensor, " query"]) -> int | None:
    """How many more queries, with as many a label, would make the 95 % interval of the mean change exclude 0.

    For a change of this size and spread between labels; then every second sample would show it. 0 where the interval
    excludes 0 already; None for a single label, and where the mean change is 0.
    """
    _, rows, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    n_labels, mean = len(sizes), math.fsum(change.tolist()) / max(1, len(change))
    if n_labels < 2 or mean == 0:
        return None
    rest = torch.zeros(n_labels, dtype=torch.float64).index_add_(0, rows, change - mean)
    variance = math.fsum((rest**2).tolist()) * n_labels / (n_labels - 1) / len(change) ** 2
    wanted = n_labels * NormalDist().inv_cdf(0.975) ** 2 * variance / mean**2
    return max(0, math.ceil(len(change) * (wanted / n_labels - 1)))


def student_t_cdf(t: float, freedom: float) -> float:
    """P(T <= t) of Student's t distribution with at least 1 degree of freedom, to about 1e-9; by Simpson's rule."""
    # With t = sqrt(v) tan(a) the density becomes c cos(a)^(v - 1) on a finite range.
    end, n = math.atan(t / math.sqrt(freedom)), 2000
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    weights = (1 if i in (0, n) else 4 if i % 2 else 2 for i in range(n + 1))
    area = math.fsum(w * math.cos(end * i / n) ** (freedom - 1) for i, w in enumerate(weights)) * end / n / 3
    return min(1.0, max(0.0, 0.5 + scale * area))


@cache
def student_t_quantile(probability: float, freedom: float) -> float:
    """The t with P(T <= t) = probability, at least 0.5, to about 1e-7; by bisection of `student_t_cdf`."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, freedom) < probability else (low, middle)
    return high


def compare(
    before: Mapping[str, Float64[Tensor, " query"]],
    after: Mapping[str, Float64[Tensor, " query"]],
    clusters: Int64[Tensor, " query"] | None,
    *,
    seed: int,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Paired comparison of every metric present in both: interval, p-value and queries better, worse, equal.

    Rows are the same queries in the same order; larger is better. Raises `BadInput` where no metric is shared.
    """
    keys = [key for key in before if key in after]
    if not keys:
        raise BadInput(f"no metric in common: {sorted(before)} against {sorted(after)}; use the same ks")
    change = torch.stack([after[key] - before[key] for key in keys], dim=1)
    intervals = bootstrap(change, clusters, seed=seed, n_resamples=n_resamples, level=level)
    p_values = sign_flip_p_values(change, clusters, seed=seed, n_resamples=n_resamples)
    n_clusters = len(change) if clusters is None else len(torch.unique(clusters))
    better, worse = (change > 0).sum(dim=0).tolist(), (change < 0).sum(dim=0).tolist()
    return {
        key: Difference(i.mean, i.low, i.high, p_value, n_better, n_worse, len(change) - n_better - n_worse, n_clusters)
        for key, i, p_value, n_better, n_worse in zip(keys, intervals, p_values, better, worse, strict=True)
    }


def compare_to_json(
    before: Mapping[str, Float64[Tensor, " query"]],
    after: Mapping[str, Float64[Tensor, " query"]],
    clusters: Int64[Tensor, " query"] | None,
    *,
    seed: int,
    n_resamples: int = 2000,
) -> dict[str, dict[str, Any]]:
    """`compare`, with every difference as `difference_to_json` gives it."""
    differences = compare(before, after, clusters, seed=seed, n_resamples=n_resamples)
    return {key: difference_to_json(value) for key, value in differences.items()}


def difference_to_json(difference: Difference) -> dict[str, Any]:
    """A difference as metrics.json has it: the ends of the interval together as `ci95`, the rest by name."""
    fields = asdict(difference)
    return {"ci95": [fields.pop("low"), fields.pop("high")], **fields}


def compare_by_category(
    before: Mapping[str, Float64[Tensor, " query"]],
    after: Mapping[str, Float64[Tensor, " query"]],
    clusters: Int64[Tensor, " query"] | None,
    categories: Int64[Tensor, " query"],
    *,
    seed: int,
    n_resamples: int = 2000,
) -> dict[int, dict[str, Difference]]:
    """`compare` within each category, by category number in ascending order."""
    return {
        number: compare(
            {key: column[rows] for key, column in before.items()},
            {key: column[rows] for key, column in after.items()},
            None if clusters is None else clusters[rows],
            seed=seed,
            n_resamples=n_resamples,
        )
        for number, rows in rows_by_category(categories).items()
    }


def oracle(is_relevant: Bool[Tensor, "query k"], top_n: int) -> Bool[Tensor, "query k"]:
    """The best possible re-ranking of the first `top_n`: their relevant ones first, the tail unchanged."""
    # [query, top_n]: as many True at the start of each row as the head has relevant ones.
    head = is_relevant[:, :top_n]
    places = torch.arange(head.shape[1], device=head.device)
    return torch.cat([places < head.sum(dim=1, keepdim=True), is_relevant[:, top_n:]], dim=1)


def headroom_captured(before: float, after: float, ceiling: float) -> float | None:
    """Share of the possible gain that re-ranking reached, (after - before) / (ceiling - before); None without room.

    Negative where re-ranking made the metric worse; `ceiling` is the metric of `oracle`'s order.
    """
    return (after - before) / (ceiling - before) if ceiling > before else None


def knee(
    curve: Float64[Tensor, "setting query"],
    clusters: Int64[Tensor, " query"] | None,
    *,
    seed: int,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> int:
    """Position of the cheapest setting whose metric is as good as the best one's, as far as the queries can tell.

    The settings come cheapest first (ascending top_n), with the metric of every query. The best has the largest mean
    (the cheapest of equals). A setting is as good if the bootstrap interval of its paired difference to the best
    reaches 0. The interval is paired because that of the mean itself mostly measures how labels differ.
    """
    average = [math.fsum(row.tolist()) for row in curve]
    best = average.index(max(average))
    # [query, setting]: how much each setting up to the best one is behind it.
    behind = (curve[best] - curve[: best + 1]).T.contiguous()
    intervals = bootstrap(behind, clusters, seed=seed, n_resamples=n_resamples, level=level)
    return next(position for position, interval in enumerate(intervals) if interval.low <= 0)


def _cluster_sums(
    values: Float64[Tensor, "query metric"], clusters: Int64[Tensor, " query"] | None
) -> tuple[Float64[Tensor, "cluster metric"], Int64[Tensor, " cluster"]]:
    """Sum over the queries of every cluster, and their number; clusters in ascending order."""
    if clusters is None:
        return values, torch.ones(len(values), dtype=torch.int64)
    _, rows, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    exact = _round_for_exact_sums(values, len(values))
    sums = torch.zeros(len(sizes), values.shape[1], dtype=torch.float64).index_add_(0, rows, exact)
    return sums, sizes


def _round_for_exact_sums(values: Float64[Tensor, "row metric"], n_terms: int) -> Float64[Tensor, "row metric"]:
    """Multiples of a power of two such that any sum of `n_terms` of them, in any order, is exact in float64.

    The error is below n_terms * max|value| * 2^-52 per value: for a million queries 2^-32 of the largest value.
    """
    # No copy but the answer: of a million queries each copy of all metrics is 0.14 GB.
    largest = max(float(values.max()), -float(values.min())) if values.numel() else 0.0
    if largest == 0:
        return values
    # A float64 holds 53 bits: with this unit the largest possible sum is below 2^52 units.
    unit = 2.0 ** (math.ceil(math.log2(largest * (n_terms + 1))) - 52)
    return (values / unit).round_().mul_(unit)


def multinomial_draws(
    n_clusters: int, n_resamples: int, seed: int, n_drawn: int | None = None
) -> Iterator[Float64[Tensor, "resample cluster"]]:
    """How often each cluster is drawn in each resample, in blocks of resamples that keep memory bounded.

    As many are drawn as there are clusters, or `n_drawn`. A block holds until the next one is asked for: all are one
    memory. Made anew each time, they would fragment it, for glibc cannot fill the gap of an aligned piece with one of
    the same size; of 250,000 clusters the process then grows by 4 GB.
    """
    generator = torch.Generator().manual_seed(seed)
    n_drawn = n_clusters if n_drawn is None else n_drawn
    blocks = _resample_blocks(n_clusters, n_resamples)
    # [resample, draw]: the clusters drawn; [resample, cluster]: their counts.
    drawn = torch.empty(max(blocks, default=0), n_drawn, dtype=torch.int64)
    counts = torch.empty(len(drawn), n_clusters, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for rows in blocks:
        torch.randint(n_clusters, (rows, n_drawn), generator=generator, out=drawn[:rows])
        yield counts[:rows].zero_().scatter_add_(1, drawn[:rows], one.expand(rows, n_drawn))


def _sign_draws(n_clusters: int, n_resamples: int, seed: int) -> Iterator[Float64[Tensor, "resample cluster"]]:
    """A sign for each cluster, in blocks of resamples as those of `multinomial_draws`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = _resample_blocks(n_clusters, n_resamples)
    signs = torch.empty(max(blocks, default=0), n_clusters, dtype=torch.float64)
    for rows in blocks:
        torch.randint(2, (rows, n_clusters), generator=generator, out=signs[:rows])
        yield signs[:rows].mul_(2).sub_(1)


def _resample_blocks(n_clusters: int, n_resamples: int) -> list[int]:
    """Numbers of resamples that add up to `n_resamples`."""
    block = max(1, _BLOCK_ELEMENTS // n_clusters)
    return [stop - start for start, stop in sharding.blocks(n_resamples, block)]


def _check_resampling(n_queries: int, n_resamples: int) -> None:
    if n_queries == 0:
        raise BadInput("no query to resample; check labels and is_gallery")
    if n_resamples < 1:
        raise BadInput(f"n_resamples={n_resamples} must be at least 1")
