"""Another system's scores on the first stage's lists, against a plain loop; what is missing is counted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_catalogue import make_catalogue, make_lists

from distributed_rerank.config.choices import UnscoredPairs
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.external import rerank_by_scores
from distributed_rerank.tensors.candidate_lists import CandidateLists

N_IMAGES, N_LISTED = 24, 9
Rerank = Callable[..., tuple[CandidateLists, dict[str, int]]]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return make_catalogue(tmp_path_factory.mktemp("pictures"), N_IMAGES)


@pytest.fixture(scope="module")
def lists(catalogue: Catalogue) -> CandidateLists:
    return make_lists(catalogue, N_LISTED)


@pytest.fixture
def rerank(catalogue: Catalogue, lists: CandidateLists, tmp_path: Path) -> Rerank:
    def done(scores: pd.DataFrame, unscored: UnscoredPairs = "behind", column: str = "score"):
        path = tmp_path / "scores.csv"
        scores.rename(columns={"score": column}).to_csv(path, index=False)
        return rerank_by_scores(path, lists, catalogue, unscored)

    return done


def some_scores(catalogue: Catalogue, lists: CandidateLists, share: float) -> pd.DataFrame:
    """Whole numbers, so that some are equal, of a share of the listed pairs and of one pair that is in no list."""
    generator = np.random.default_rng(1)
    rows = [
        (catalogue.ids[query], catalogue.ids[item], generator.integers(0, 4))
        for query, items in zip(lists.query_items.tolist(), lists.items.tolist(), strict=True)
        for item in items
        if item >= 0 and generator.random() < share
    ]
    query = int(lists.query_items[0])
    other = next(item for item in range(N_IMAGES) if item != query and item not in lists.items[0].tolist())
    rows.append((catalogue.ids[query], catalogue.ids[other], 9))
    return pd.DataFrame(rows, columns=["query_id", "gallery_id", "score"])


@pytest.mark.parametrize(("share", "column", "sign"), [(0.6, "score", -1), (0.6, "distance", 1), (0.1, "score", -1)])
def test_scored_candidates_come_first_in_order_of_their_scores(
    share: float, column: str, sign: int, catalogue: Catalogue, lists: CandidateLists, rerank: Rerank
) -> None:
    table = some_scores(catalogue, lists, share)
    found, counts = rerank(table, column=column)
    known = {(row.query_id, row.gallery_id): sign * row.score for row in table.itertuples()}
    n_unscored = n_queries = 0
    for row, query in enumerate(lists.query_items.tolist()):
        items = [item for item in lists.items[row].tolist() if item >= 0]
        keys = [known.get((catalogue.ids[query], catalogue.ids[item]), np.inf) for item in items]
        expected = [items[place] for place in sorted(range(len(items)), key=lambda place: (keys[place], place))]
        assert found.items[row, : len(items)].tolist() == expected
        n_unscored += sum(np.isinf(keys))
        n_queries += bool(np.isinf(keys).all())
    assert counts == {"unscored": n_unscored, "queries_unscored": n_queries, "unused": 1}
    assert not torch.equal(found.items, lists.items)


def test_missing_scores_are_refused_where_that_is_asked_for(
    catalogue: Catalogue, lists: CandidateLists, rerank: Rerank
) -> None:
    everything = some_scores(catalogue, lists, 1.0)
    assert rerank(everything, "error")[1]["unscored"] == 0
    with pytest.raises(BadInput, match="has no score of 1 candidates, and 0 queries have none at all"):
        rerank(everything.drop(index=3), "error")
    with pytest.raises(BadInput, match="scores no candidate of this first stage"):
        rerank(everything.tail(1))
