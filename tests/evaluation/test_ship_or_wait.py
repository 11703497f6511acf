"""Labels to check, planted by hand; figures with other labels against a new evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_runs import planted_catalogue, planted_ranking

from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.evaluation import MeasureConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.evaluation.measure import count_relevant, measure
from distributed_rerank.evaluation.ranked import Ranked, rank
from distributed_rerank.evaluation.ship_or_wait import N_LABELS_TO_CHECK, labels_to_check, ship_or_wait
from distributed_rerank.report.verdict import ship_or_wait_in_words
from distributed_rerank.reranking.lists import FirstStage
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.suspects import PROBABLE


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """240 items of 60 labels."""
    return planted_catalogue(tmp_path)


def ranked_by_truth(catalogue: Catalogue, wrong: dict[int, int]) -> tuple[Catalogue, Ranked]:
    """Lists that know the truth, and a catalogue in which these items have the label of another item."""
    lists = planted_ranking(catalogue, {}, width=3)
    texts = catalogue.table["label"].to_numpy().copy()
    for item, other in wrong.items():
        texts[item] = catalogue.table["label"].iloc[other]
    labelled = replace(catalogue, table=catalogue.table.assign(label=texts))
    return labelled, rank(FirstStage(labelled, lists, None, []), ScoredLists(lists), Chain(), has_model=False)


def test_planted_wrong_labels_come_first_and_each_image_once(catalogue: Catalogue) -> None:
    wrong = {5: 100, 50: 8, 120: 3}
    labelled, ranked = ranked_by_truth(catalogue, wrong)
    pairs = labels_to_check(ranked, count_relevant(labelled, ranked.query_items))
    assert {pair["query_id"] for pair in pairs[:3]} == {str(labelled.ids[item]) for item in wrong}
    for pair in pairs[:3]:
        item = int(labelled.items_of([pair["query_id"]])[0])
        assert pair["gallery_label"] == catalogue.table["label"].iloc[item]
        assert pair["query_label"] == labelled.table["label"].iloc[item]
        assert pair["rank"] == 1
    precisions = [pair["precision"] for pair in pairs]
    assert precisions == sorted(precisions, reverse=True)
    assert precisions[2] > PROBABLE > max(precisions[3:], default=0.0)
    shown = [id for pair in pairs for id in (pair["query_id"], pair["gallery_id"])]
    assert len(set(shown)) == len(shown)
    assert len(pairs) <= N_LABELS_TO_CHECK


def test_figures_with_other_labels_are_those_of_the_true_catalogue(catalogue: Catalogue) -> None:
    labelled, ranked = ranked_by_truth(catalogue, {5: 100, 50: 8, 120: 3})
    queries = count_relevant(labelled, ranked.query_items)
    measured = measure(labelled, ranked.query_items, ranked.before, {}, n_resamples=50)
    found = ship_or_wait(ranked, queries, measured, labels_to_check(ranked, queries), MeasureConfig())
    assert measured.metrics["first_stage"]["cmc@1"] < 1
    changed = found["if_suspects_are_wrong"]
    assert (changed["n_labels"], changed["cmc@1"]["mean"], changed["map@10"]["mean"]) == (3, 1.0, 1.0)
    assert found["more_queries"] == {}
    text = ship_or_wait_in_words(measured.metrics | {"ship_or_wait": found})
    assert text[0] == "CMC@1 is 0.971, or 1.000 [1.000, 1.000] if 3 labels to check (below) are wrong."


def test_more_queries_are_asked_for_where_the_gain_may_be_chance(catalogue: Catalogue) -> None:
    before = planted_ranking(catalogue, {"cups": 0.2, "toys": 0.2})
    after = {12: planted_ranking(catalogue, {"cups": 0.2, "toys": 0.17}, seed=1)}
    query_items = torch.from_numpy(catalogue.query_items)
    measured = measure(catalogue, query_items, before, after)
    lists = CandidateLists(query_items, before.items, before.distances)
    ranked = rank(FirstStage(catalogue, lists, None, []), ScoredLists(lists), Chain(), has_model=False)
    queries = count_relevant(catalogue, query_items)
    found = ship_or_wait(ranked, queries, measured, [], MeasureConfig())["more_queries"]
    low, high = measured.metrics["difference"]["cmc@1"]["ci95"]
    assert low <= 0 <= high
    assert measured.after is not None
    change = measured.after["cmc@1"] - measured.before["cmc@1"]
    assert found["cmc@1"] == statistics.queries_needed(change, queries.labels) > 0
    words = ship_or_wait_in_words(measured.metrics | {"ship_or_wait": {"more_queries": found}})
    assert f"some {found['cmc@1']:,} more labelled queries" in words[0]
    assert not np.isclose(float(change.mean()), 0)


def test_the_only_image_of_a_label_is_no_suspect(catalogue: Catalogue) -> None:
    """Its neighbours have other labels, whatever it shows."""
    texts = catalogue.table["label"].to_numpy().copy()
    texts[5] = "a label of its own"
    lonely = replace(catalogue, table=catalogue.table.assign(label=texts))
    lists = planted_ranking(catalogue, {}, width=3)
    ranked = rank(FirstStage(lonely, lists, None, []), ScoredLists(lists), Chain(), has_model=False)
    pairs = labels_to_check(ranked, count_relevant(lonely, ranked.query_items))
    assert str(lonely.ids[5]) not in {pair["query_id"] for pair in pairs}
