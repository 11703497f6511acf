"""Retrieval metrics as open-metric-learning 4.0.0 defines them, so that teams coming from OML find their old figures.

OML's precision and map are not the textbook ones of `metrics`: their divisors depend on the number of hits. Two things
differ from OML: where its precision is NaN (nothing relevant exists, yet something was retrieved) it is 0 here and the
caller counts such queries; the principal component fraction is computed in float64 and never exceeds 1.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.metrics import PerQuery, running_sums, sorted_cutoffs

ROWS = 1 << 16
"""Embeddings whose products are added at a time."""


def per_query(
    is_relevant: Bool[Tensor, "query k"],
    n_retrieved: Int64[Tensor, " query"],
    n_relevant: Int64[Tensor, " query"],
    ks: Sequence[int] = (1, 5, 10),
) -> PerQuery:
    """OML's `cmc@k`, `precision@k` and `map@k` of every query, float64.

    With L = `n_retrieved` (the length of the query's list; the places after it must be False), R = `n_relevant`, k' =
    min(k, L), hits(i) = sum_{j<=i} rel(j) and h = hits(k'):

    | | value | R = 0, L = 0 | R > 0, L = 0 | R = 0, L > 0 |
    |---|---|---|---|---|
    | cmc@k | [h > 0] | 1 | 0 | 0 |
    | precision@k | h / min(R, k') | 1 | 0 | 0 (NaN in OML) |
    | map@k | (1 / h) sum_{i<=k'} rel(i) hits(i) / i, 0 if h = 0 | 1 | 0 | 0 |

    Raises `BadInput` for a cut-off below 1.
    """
    ks = sorted_cutoffs(ks)
    hits, precision_sums = running_sums(is_relevant[:, : ks[-1]])
    is_void = (n_retrieved == 0) & (n_relevant == 0)
    values: PerQuery = {}
    for k in ks:
        # [query]: both sums after k places, or after the whole list where it is shorter.
        n_hits, precision_sum = (sums[:, min(k, sums.shape[1] - 1)] for sums in (hits, precision_sums))
        divisor = torch.minimum(n_relevant, n_retrieved.clamp(max=k)).clamp(min=1)
        values[f"cmc@{k}"] = ((n_hits > 0) | is_void).double()
        values[f"precision@{k}"] = torch.where(is_void, 1.0, n_hits / divisor.double())
        values[f"map@{k}"] = torch.where(is_void, 1.0, precision_sum / n_hits.clamp(min=1))
    return values


def fnmr_at_fmr(
    positive_distances: Float[Tensor, " positive"],
    negative_distances: Float[Tensor, " negative"],
    fmrs: Sequence[float],
) -> dict[str, float]:
    """False non-match rate at each false match rate, keys `fnmr@fmr=<rate>`.

    The threshold T is the `fmr` quantile of the distances of all negative pairs, linear between the two nearest
    (`np.quantile`); the answer is the share of positive pairs with distance >= T. All queries together, in float64,
    with no limit on the number of pairs. Raises `BadInput` for a rate outside [0, 1] or no pairs.
    """
    if any(not 0 <= fmr <= 1 for fmr in fmrs):
        raise BadInput(f"fmrs={list(fmrs)} must lie in [0, 1]")
    if not len(positive_distances) or not len(negative_distances):
        raise BadInput("fnmr@fmr needs a positive and a negative pair; check the labels")
    ordered = negative_distances.double().sort().values
    thresholds = [_quantile(ordered, fmr) for fmr in fmrs]
    n_positive = len(positive_distances)
    return {
        f"fnmr@fmr={fmr:g}": int((positive_distances.double() >= threshold).sum()) / n_positive
        for fmr, threshold in zip(fmrs, thresholds, strict=True)
    }


def pcf(embeddings: Float[Tensor, "item dim"], variances: Sequence[float] = (0.5,)) -> dict[str, float]:
    """Principal component fraction, keys `pcf@<variance>`: share of axes needed to explain more than that variance.

    n / dim with n the largest number for which the first n - 1 axes of the centred embeddings explain at most
    `variance`, and at most 1; by the eigenvalues of their covariance in float64, summed some rows at a time. Equal
    embeddings have no axis and give 0. Raises `BadInput` for a variance outside [0, 1] or fewer than 2 embeddings.
    """
    return pcf_of_parts(lambda: embeddings.split(ROWS), variances)


def pcf_of_parts(read: Callable[[], Iterable[Tensor]], variances: Sequence[float]) -> dict[str, float]:
    """`pcf` of embeddings that `read` gives in parts of `ROWS`, from the first again at each call."""
    if any(not 0 <= variance <= 1 for variance in variances):
        raise BadInput(f"variances={list(variances)} must lie in [0, 1]")
    total, n = torch.zeros(0), 0
    for part in read():
        total = part.double().sum(dim=0) + (total if n else torch.zeros(part.shape[1], dtype=torch.float64))
        n += len(part)
        del part
    if n < 2:
        raise BadInput(f"pcf needs at least 2 embeddings, not {n}")
    mean, dim = total / n, len(total)
    products = torch.zeros(dim, dim, dtype=torch.float64)
    for part in read():
        products += _products(part, mean)
        del part  # or it would stay in memory while the next one is read
    # [axis]: variance explained by the first axis, the first two, ..., up to a common factor.
    # Embeddings that are fewer than their axes span no more axes than they are; the rest is rounding.
    explained = torch.linalg.eigvalsh(products).flip(0).clamp(min=0)[:n].cumsum(dim=0)
    if float(explained[-1]) == 0:
        return {f"pcf@{variance:g}": 0.0 for variance in variances}
    ratio = explained / explained[-1]
    # Sums that are equal on paper differ by rounding; without the slack the count would depend on it.
    n_axes = {variance: int((ratio <= variance + 1e-12).sum()) + 1 for variance in variances}
    return {f"pcf@{variance:g}": min(n, dim) / dim for variance, n in n_axes.items()}


def _products(part: Tensor, mean: Tensor) -> Tensor:
    centred = part.double().sub_(mean)
    return centred.T @ centred


def _quantile(ordered: Float64[Tensor, " value"], share: float) -> float:
    """The linear quantile of sorted values; `torch.quantile` refuses more than 2^24 of them."""
    position = share * (len(ordered) - 1)
    below = int(position)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    weight = position - below
    # NumPy's formula: exact at both ends, so a threshold that should equal a distance does.
    return high - (high - low) * (1 - weight) if weight >= 0.5 else low + (high - low) * weight
