"""Adaptive n: queries for which the first stage looks sure are not re-ranked, which saves their pairs.

How sure it looks follows from its distances alone, before any pair is scored. The threshold is cross-fitted: the labels
of the evaluated queries are halved, and each half is measured with the threshold chosen on the other.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from distributed_rerank.evaluation.measure import LabelledQueries, of_all_blocks
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.tensors import metrics, statistics
from distributed_rerank.tensors.label_split import half_of_labels

METRIC = "map@10"
KEPT_GAIN = 0.95
"""Share of the full re-ranking's gain that a threshold must keep on the labels that choose it."""
SHARES = tuple(step / 20 for step in range(21))
"""Shares of the queries that are tried for skipping, the surest first."""
CHOSEN_ON = "the other half of the evaluated queries' labels"

Values = Float64[np.ndarray, " query"]


def margins(ranked: Ranked, queries: LabelledQueries, top_n: int) -> dict[str, Values]:
    """How sure the first stage looks for each labelled query; inf where there is nothing to re-rank.

    gap: the distance from the first candidate to the second. spread: from the first to the last one re-ranked.
    """

    def of_block(block: LabelledQueries) -> dict[str, Tensor]:
        gap, spread = _margins(ranked.before[block.rows].distances[:, :top_n].double().numpy())
        return {"gap": torch.from_numpy(gap), "spread": torch.from_numpy(spread)}

    return {name: column.numpy() for name, column in of_all_blocks(queries, of_block).items()}


def _margins(head: Float64[np.ndarray, "query n"]) -> tuple[Values, Values]:
    """Gap and spread of a block of queries."""
    n_candidates = np.isfinite(head).sum(axis=1)
    if head.shape[1] < 2:
        return np.full(len(head), np.inf), np.full(len(head), np.inf)
    last = np.take_along_axis(head, (n_candidates - 1).clip(min=0)[:, None], axis=1)[:, 0]
    is_open = n_candidates > 1
    first, second, last = (np.where(is_open, column, 0.0) for column in (head[:, 0], head[:, 1], last))
    return np.where(is_open, second - first, np.inf), np.where(is_open, last - first, np.inf)


def choose_threshold(signals: dict[str, Values], before: Values, after: Values) -> tuple[str, float]:
    """The signal and threshold that skip the most queries and keep `KEPT_GAIN` of the gain; inf skips none."""
    floor = before.sum() + KEPT_GAIN * (after.sum() - before.sum())
    best = (0, next(iter(signals)), np.inf)
    for name, signal in signals.items():
        descending = np.sort(signal)[::-1]
        for share in SHARES[1:]:
            threshold = float(descending[max(1, round(share * len(signal))) - 1])
            is_skipped = signal >= threshold
            if is_skipped.sum() > best[0] and np.where(is_skipped, before, after).sum() >= floor:
                best = (int(is_skipped.sum()), name, threshold)
    return best[1], best[2]


def measure_adaptive(
    ranked: Ranked, queries: LabelledQueries, before: Tensor, after: Tensor, *, seed: int, n_resamples: int = 2000
) -> tuple[dict[str, Any], dict[str, Values]]:
    """What skipping sure queries saves and loses, and its columns of per_query.parquet.

    `before` and `after` are `METRIC` of the labelled queries by the first stage and by the pairwise step, the one that
    needs pairs. The figures: pairs of all labelled queries, pairs saved, the metric with and without skipping, their
    difference with its interval, the threshold of each half, and a curve over the share skipped. A single label cannot
    be halved: `skipped` then says so.
    """
    assert ranked.chain.pairwise is not None, "the chain has a pairwise step"
    is_first = half_of_labels(queries.labels, np.random.default_rng([seed, 0xADA]).permutation).numpy()
    if not is_first.any() or is_first.all():
        return {"skipped": "the queries of a single label cannot be halved"}, {}
    top_n = ranked.chain.pairwise.top_n
    signals = margins(ranked, queries, top_n)
    values = before.numpy(), after.numpy()
    is_skipped = np.zeros(len(is_first), bool)
    chosen = []
    for measured in (is_first, ~is_first):
        others = {name: signal[~measured] for name, signal in signals.items()}
        name, threshold = choose_threshold(others, values[0][~measured], values[1][~measured])
        is_skipped[measured] = signals[name][measured] >= threshold
        chosen.append({"signal": name, "threshold": threshold if np.isfinite(threshold) else None})
    pairs = of_all_blocks(
        queries, lambda block: {"pairs": (ranked.before[block.rows].items[:, :top_n] >= 0).sum(dim=1)}
    )["pairs"].numpy()
    adaptive = torch.where(torch.from_numpy(is_skipped), before, after)
    compared = statistics.compare_to_json(
        {METRIC: after}, {METRIC: adaptive}, queries.labels, seed=seed, n_resamples=n_resamples
    )
    figures = {
        "metric": METRIC,
        "kept_gain": KEPT_GAIN,
        "chosen_on": CHOSEN_ON,
        "thresholds": chosen,
        "n_skipped": int(is_skipped.sum()),
        "pairs": int(pairs.sum()),
        "pairs_saved": int(pairs[is_skipped].sum()),
        **metrics.means({"first_stage": before, "reranked": after, "adaptive": adaptive}),
        "difference": compared[METRIC],
        "curve": {name: _curve(signal, *values) for name, signal in signals.items()},
    }
    columns = {f"first_stage_{name}": np.where(np.isfinite(s), s, np.nan) for name, s in signals.items()}
    return figures, columns | {"adaptive_skipped": is_skipped.astype(np.float64)}


def _curve(signal: Values, before: Values, after: Values) -> list[dict[str, float]]:
    """The metric when the surest share of the queries is not re-ranked, for each of `SHARES`; ties by position."""
    order = np.argsort(-signal, kind="stable")
    total = math.fsum(after.tolist())
    points = []
    for share in SHARES:
        skipped = order[: round(share * len(order))]
        lost = math.fsum((after[skipped] - before[skipped]).tolist())
        points.append({"share": share, METRIC: (total - lost) / len(order)})
    return points
