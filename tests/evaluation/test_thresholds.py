"""Thresholds of the probability, counted pair by pair with Python's own numbers."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.evaluation import thresholds
from distributed_rerank.evaluation.measure import count_relevant
from distributed_rerank.reranking.lists import LazyRanking
from distributed_rerank.tensors.candidate_lists import CandidateLists

TOP_N = 6


@pytest.mark.parametrize("seed", range(3))
def test_shares_at_each_threshold_are_those_counted_by_hand(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    table = pd.DataFrame({"path": [f"{i:02d}.png" for i in range(n)], "label": rng.integers(0, 8, n)})
    table = table.assign(split="validation", is_query=True, is_gallery=True)
    table.to_csv(tmp_path / "df.csv", index=False)
    catalogue = read_catalogue(str(tmp_path / "df.csv"), purpose="evaluation")
    items = np.stack([rng.permutation(np.delete(np.arange(n), query))[:10] for query in range(n)])
    distances = np.sort(rng.normal(size=(n, 10)).astype(np.float32), axis=1)
    items[3, 4:], distances[3, 4:] = -1, np.inf
    items[5], distances[5] = -1, np.inf
    lists = CandidateLists.from_arrays(np.arange(n), items, distances)
    queries = count_relevant(catalogue, torch.arange(n))
    ranking = LazyRanking(torch.arange(n), lists.of_queries)
    chain = Chain(calibration={"slope": 2.0, "intercept": 0.5})
    found = thresholds.by_probability(ranking, queries, TOP_N, chain)
    labels, n_relevant = catalogue.labels, int(queries.n_relevant.sum())
    assert [row["probability"] for row in found] == list(thresholds.THRESHOLDS)
    for row in found:
        accepted, answered = [], []
        for query in queries.query_items.tolist():
            for place in range(TOP_N):
                probability = 1 / (1 + math.exp(2 * float(distances[query, place]) - 0.5))
                if items[query, place] >= 0 and probability >= row["probability"]:
                    is_right = labels[items[query, place]] == labels[query]
                    accepted.append(is_right)
                    answered += [is_right] if place == 0 else []
        assert (row["n_accepted"], row["n_answered"]) == (len(accepted), len(answered))
        assert row["recall"] == pytest.approx(sum(accepted) / n_relevant)
        for key, flags in (("precision", accepted), ("right_first", answered)):
            assert row[key] == (pytest.approx(sum(flags) / len(flags)) if flags else None)
    assert thresholds.by_probability(ranking, queries, TOP_N, Chain()) == []
