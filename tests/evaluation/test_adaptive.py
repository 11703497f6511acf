"""Adaptive n on planted queries: sure ones lose nothing when they are skipped."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.evaluation.adaptive import choose_threshold, margins, measure_adaptive
from distributed_rerank.evaluation.measure import count_relevant
from distributed_rerank.evaluation.ranked import Ranked, rank
from distributed_rerank.reranking.lists import FirstStage
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors.candidate_lists import CandidateLists

N_LABELS = 40


@pytest.fixture
def ranked(tmp_path: Path) -> Ranked:
    """One query and two gallery items a label; the first of two candidates is nearer by far for even queries."""
    rows = [(f"q{n:02d}.png", n, "validation", True, False) for n in range(N_LABELS)]
    rows += [(f"g{n:02d}{part}.png", n, "validation", False, True) for n in range(N_LABELS) for part in "ab"]
    columns = ["path", "label", "split", "is_query", "is_gallery"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "df.csv", index=False)
    catalogue = read_catalogue(str(tmp_path / "df.csv"), purpose="evaluation")
    queries = catalogue.query_items
    own = np.array([np.flatnonzero(catalogue.labels == label)[:2] for label in catalogue.labels[queries]])
    is_sure = np.arange(N_LABELS) % 2 == 0
    distances = np.stack([np.full(N_LABELS, 0.1), np.where(is_sure, 0.9, 0.2)], axis=1).astype(np.float32)
    lists = CandidateLists.from_arrays(queries, own, distances)
    first = FirstStage(catalogue, lists, None, [])
    return rank(first, ScoredLists(lists, torch.zeros(N_LABELS, 2)), Chain((PairwiseStep(top_n=2),)), True)


def test_margins_are_gap_and_spread_and_inf_without_a_choice(ranked: Ranked) -> None:
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    found = margins(ranked, queries, 2)
    np.testing.assert_allclose(found["gap"], np.where(np.arange(N_LABELS) % 2 == 0, 0.8, 0.1), rtol=1e-6)
    np.testing.assert_array_equal(found["gap"], found["spread"])
    assert np.isinf(margins(ranked, queries, 1)["spread"]).all()


def test_choose_threshold_skips_most_that_keep_the_gain() -> None:
    signal = np.arange(100.0)
    before, after = np.zeros(100), np.where(signal < 50, 1.0, 0.0)
    # the upper half gains nothing, and 5 % of the gain may be lost below it: two of the fifty, but steps are of five
    assert choose_threshold({"gap": signal}, before, after) == ("gap", 50.0)
    assert choose_threshold({"noise": signal % 7, "gap": signal}, before, after)[0] == "gap"
    assert choose_threshold({"gap": signal}, after, before) == ("gap", 0.0), "without a gain everything is skipped"


def test_adaptive_saves_the_pairs_of_sure_queries(ranked: Ranked) -> None:
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    is_sure = torch.arange(N_LABELS) % 2 == 0
    before = torch.where(is_sure, 1.0, 0.25).double()
    after = torch.where(is_sure, 1.0, 0.75).double()
    found, columns = measure_adaptive(ranked, queries, before, after, seed=0, n_resamples=50)
    assert columns["adaptive_skipped"].tolist() == is_sure.double().tolist()
    assert (found["n_skipped"], found["pairs"], found["pairs_saved"]) == (20, 80, 40)
    assert found["adaptive"] == found["reranked"] == pytest.approx(0.875)
    assert found["difference"]["mean"] == 0
    assert [point["map@10"] for point in found["curve"]["gap"]][::10] == pytest.approx([0.875, 0.875, 0.625])
    assert "other half" in found["chosen_on"]


def test_adaptive_threshold_comes_from_the_other_half(ranked: Ranked) -> None:
    """Changing the values of one half changes which queries of the other half are skipped, and only those."""
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    before = torch.zeros(N_LABELS, dtype=torch.float64)
    after = torch.where(torch.arange(N_LABELS) % 2 == 0, 0.0, 1.0).double()
    _, columns = measure_adaptive(ranked, queries, before, after, seed=0, n_resamples=10)
    chosen = np.random.default_rng([0, 0xADA]).permutation(np.unique(queries.labels.numpy()))[: N_LABELS // 2]
    is_first = np.isin(queries.labels.numpy(), chosen)
    changed = after.clone()
    changed[torch.from_numpy(is_first)] = 1.0
    _, other = measure_adaptive(ranked, queries, before, changed, seed=0, n_resamples=10)
    differs = columns["adaptive_skipped"] != other["adaptive_skipped"]
    assert differs.any()
    assert not differs[is_first].any()
