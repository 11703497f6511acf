"""What accepting candidates by their probability of a match would give: precision and recall at each threshold."""

from typing import Any

import torch

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.probability import probabilities
from distributed_rerank.evaluation.measure import LabelledQueries
from distributed_rerank.tensors.candidate_lists import Ranking

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


def by_probability(ranking: Ranking, queries: LabelledQueries, top_n: int, chain: Chain) -> list[dict[str, Any]]:
    """For each threshold: candidates accepted among the first `top_n`, precision, recall, queries answered.

    `precision` is the share of the accepted candidates that are relevant, None where none is accepted; `recall` the
    share of all relevant items of the queries that are accepted. `n_answered` counts queries with an accepted
    candidate, `right_first` is the share of these whose first candidate is relevant, None where there is none. [] for a
    chain without calibration.
    """
    if not chain.calibration:
        return []
    edges = torch.tensor(THRESHOLDS, dtype=torch.float64)
    # [threshold + 1]: how many have a probability in the bin below each threshold, and above the last.
    counts = {
        name: torch.zeros(len(edges) + 1, dtype=torch.int64) for name in ("accepted", "right", "answered", "first")
    }
    for block in queries.blocks():
        lists = ranking[block.rows]
        items, distances = lists.items[:, :top_n], lists.distances[:, :top_n]
        found = probabilities(chain, distances)
        assert found is not None, "the chain has a calibration"
        is_listed = (items >= 0) & distances.isfinite()
        is_relevant = is_listed & (block.item_labels[items] == block.labels[:, None])
        bins = torch.bucketize(found.double(), edges, right=True)
        # [query]: the first candidate has the largest probability, for it falls with the distance.
        has_first = is_listed[:, :1].any(dim=1)
        first_bin, is_right_first = (table[has_first][:, :1].flatten() for table in (bins, is_relevant))
        for name, chosen in (
            ("accepted", bins[is_listed]),
            ("right", bins[is_relevant]),
            ("answered", first_bin),
            ("first", first_bin[is_right_first]),
        ):
            counts[name] += torch.bincount(chosen, minlength=len(edges) + 1)
    n_relevant = int(queries.n_relevant.sum())
    # [threshold]: at or above it.
    at = {name: column.flip(0).cumsum(0).flip(0)[1:].tolist() for name, column in counts.items()}
    return [
        {
            "probability": threshold,
            "n_accepted": accepted,
            "precision": right / accepted if accepted else None,
            "recall": right / n_relevant,
            "n_answered": answered,
            "right_first": first / answered if answered else None,
        }
        for threshold, accepted, right, answered, first in zip(
            THRESHOLDS, at["accepted"], at["right"], at["answered"], at["first"], strict=True
        )
    ]
