"""Histograms of distances and suspected labels, planted by hand."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from small_catalogue import make_catalogue

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.evaluation.distances import N_BINS, separation, suspects
from distributed_rerank.evaluation.measure import count_relevant
from distributed_rerank.evaluation.ranked import Ranked, rank
from distributed_rerank.reranking.first_stage import FirstStage
from distributed_rerank.reranking.run import Scored


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """Items 0 to 3 of label 0, 4 to 7 of label 1, 8 and 9 of label 2."""
    return make_catalogue(tmp_path, 10)


def ranked_of(catalogue: Catalogue, rows: dict[int, list[tuple[int, float]]]) -> Ranked:
    width = max(map(len, rows.values()))
    items = [[item for item, _ in row] + [-1] * (width - len(row)) for row in rows.values()]
    distances = [[value for _, value in row] + [float("inf")] * (width - len(row)) for row in rows.values()]
    tensors = torch.tensor(items), torch.tensor(distances)
    lists = CandidateLists(torch.tensor(list(rows)).numpy(), tensors[0].numpy(), tensors[1].numpy())
    return rank(FirstStage(catalogue, lists, None, []), Scored(lists, None, []), Chain(), has_model=False)


def test_separation_counts_every_listed_candidate_once(catalogue: Catalogue) -> None:
    ranked = ranked_of(catalogue, {0: [(1, 0.0), (4, 0.5), (2, 1.0)], 4: [(8, 0.25), (5, 0.5)]})
    judged = count_relevant(ranked.catalogue, ranked.query_items)
    found = separation(ranked.before, judged, 3)
    assert (found["edges"][0], found["edges"][-1], len(found["edges"])) == (0.0, 1.0, N_BINS + 1)
    assert (sum(found["relevant"]), sum(found["other"])) == (3, 2)
    assert (found["relevant"][0], found["relevant"][-1], found["relevant"][N_BINS // 2]) == (1, 1, 1)
    assert sum(separation(ranked.before, judged, 1)["other"]) == 1
    assert separation(ranked_of(catalogue, {0: [(1, 0.5)]}).before, judged, 3) == {}


def test_suspects_are_the_nearest_of_other_labels_each_image_once(catalogue: Catalogue) -> None:
    rows = {
        0: [(1, 0.1), (4, 0.2)],
        4: [(0, 0.2), (8, 0.9)],  # the same pair from the other side
        5: [(0, 0.3), (9, 0.4)],  # item 0 is taken already, and only the nearest counts
        6: [(7, 0.0), (3, 0.25)],
        8: [(9, 0.5)],
    }
    found = suspects(ranked_of(catalogue, rows))
    ids = catalogue.ids
    assert [(pair["query_id"], pair["gallery_id"]) for pair in found] == [(ids[0], ids[4]), (ids[6], ids[3])]
    assert pd.DataFrame(found)[["query_label", "gallery_label", "rank"]].values.tolist() == [
        ["0", "1", 2],
        ["1", "0", 2],
    ]
    assert found[0]["distance"] == pytest.approx(0.2)
