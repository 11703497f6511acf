"""What OML, pytrec_eval, torchreid and sentence-transformers say about one small example, beside our figures.

Five queries and nine gallery items in the plane; a query may not find its own label as its own camera took it. The
values were written down from OML 4.0.0, pytrec-eval-terrier 0.5.11, torchreid 0.2.5 (`eval_market1501`) and
sentence-transformers 6.2.0 (`InformationRetrievalEvaluator`); none of them is needed here.
"""

import pytest
import torch

from distributed_rerank.tensors import metrics, oml_metrics
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.knn import nearest

QUERIES = torch.tensor([[0, 0], [10, 1], [3, 7], [8, 8], [1, 4]]).float()
QUERY_LABELS, QUERY_CAMERAS = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 0, 1, 0])
GALLERY = torch.tensor([[2, 0], [9, 3], [2, 6], [7, 5], [0, 5], [6, 1], [4, 4], [10, 9], [3, 2]]).float()
LABELS, CAMERAS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 1, 0, 2, 1, 1])
FIRST_QUERY = 100

THIRD, SIXTH = 1 / 3, 1 / 6
OF_EACH_QUERY = {
    "pytrec_eval": {
        "success_1": ("cmc@1", [1, 1, 1, 0, 1]),
        "success_5": ("cmc@5", [1, 1, 1, 1, 1]),
        "P_1": ("precision@1", [1, 1, 1, 0, 1]),
        "P_5": ("precision@5", [0.4, 0.2, 0.2, 0.2, 0.2]),
        "recall_5": ("recall@5", [2 * THIRD, 1, 1, 0.5, 0.5]),
        "Rprec": ("precision@r", [2 * THIRD, 1, 1, 0, 0.5]),
        "recip_rank": ("mrr", [1, 1, 1, THIRD, 1]),
        "map": ("map@9", [0.7222222222222222, 1, 1, 0.30952380952380953, 0.625]),
    },
    "OML": {
        "cmc 1": ("cmc@1", [1, 1, 1, 0, 1]),
        "cmc 5": ("cmc@5", [1, 1, 1, 1, 1]),
        "precision 1": ("precision@1", [1, 1, 1, 0, 1]),
        "precision 5": ("precision@5", [2 * THIRD, 1, 1, 0.5, 0.5]),
        "map 1": ("map@1", [1, 1, 1, 0, 1]),
        "map 5": ("map@5", [5 * SIXTH, 1, 1, THIRD, 1]),
    },
}
MEANS = {
    "torchreid": {"cmc[0]": ("cmc@1", 0.8), "cmc[1]": ("cmc@2", 0.8), "cmc[2]": ("cmc@3", 1.0),
                  "mAP": ("map@9", 0.7313492063492063)},
    "sentence-transformers": {
        "accuracy@1": ("cmc@1", 0.8), "accuracy@5": ("cmc@5", 1.0), "precision@5": ("precision@5", 0.24),
        "recall@1": ("recall@1", 0.5666666666666667), "recall@5": ("recall@5", 0.7333333333333333),
        "mrr@5": ("mrr", 0.8666666666666668), "map@5": ("map@5", 0.6444444444444444),
    },
}  # fmt: skip


def lists() -> CandidateLists:
    return nearest(
        QUERIES,
        GALLERY,
        query_items=FIRST_QUERY + torch.arange(5),
        gallery_items=torch.arange(9),
        query_sequences=10 * QUERY_LABELS + QUERY_CAMERAS,
        gallery_sequences=10 * LABELS + CAMERAS,
        n_items=9,
    )


def counts(found: CandidateLists) -> tuple[torch.Tensor, torch.Tensor]:
    is_relevant = metrics.relevance(found.items, QUERY_LABELS, LABELS)
    sequences = 10 * QUERY_LABELS + QUERY_CAMERAS, 10 * LABELS + CAMERAS
    of_queries = (FIRST_QUERY + torch.arange(5), QUERY_LABELS, sequences[0])
    return is_relevant, metrics.count_relevant(*of_queries, torch.arange(9), LABELS, sequences[1])


@pytest.fixture(scope="module")
def ours() -> dict[str, metrics.PerQuery]:
    found = lists()
    is_relevant, n_relevant = counts(found)
    n_retrieved = (found.items[:, :5] >= 0).sum(dim=1)
    return {
        "textbook": metrics.per_query(is_relevant, n_relevant, (1, 2, 3, 5, 9)),
        "OML": oml_metrics.per_query(is_relevant[:, :5], n_retrieved, n_relevant, (1, 5)),
    }


def test_lists_are_those_that_the_peers_were_given() -> None:
    given = [
        [8, 4, 6, 5, 2, 3, 1, 7, -1],
        [1, 5, 3, 6, 8, 0, 2, -1, -1],
        [2, 6, 4, 3, 8, 0, 1, 7, -1],
        [7, 1, 6, 2, 5, 4, 0, -1, -1],
        [4, 2, 8, 6, 0, 5, 3, 7, -1],
    ]
    assert lists().items.tolist() == given


@pytest.mark.parametrize(
    ("peer", "name"), [(peer, name) for peer, table in OF_EACH_QUERY.items() for name in table], ids="-".join
)
def test_value_of_each_query_is_the_peers(peer: str, name: str, ours: dict[str, metrics.PerQuery]) -> None:
    key, wanted = OF_EACH_QUERY[peer][name]
    assert ours["OML" if peer == "OML" else "textbook"][key].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("peer", "name"), [(peer, name) for peer, table in MEANS.items() for name in table])
def test_mean_is_the_peers(peer: str, name: str, ours: dict[str, metrics.PerQuery]) -> None:
    key, wanted = MEANS[peer][name]
    assert metrics.means(ours["textbook"])[key] == pytest.approx(wanted, abs=1e-7)


def test_fnmr_at_fmr_is_omls() -> None:
    distances = torch.cdist(QUERIES.double(), GALLERY.double())
    is_same = QUERY_LABELS[:, None] == LABELS
    own_camera = is_same & (QUERY_CAMERAS[:, None] == CAMERAS)
    found = oml_metrics.fnmr_at_fmr(distances[is_same & ~own_camera], distances[~is_same], (0.1, 0.5))
    assert list(found.values()) == pytest.approx([2 * THIRD, THIRD], abs=1e-12)


def test_pcf_is_omls() -> None:
    assert list(oml_metrics.pcf(GALLERY, (0.5, 0.9)).values()) == pytest.approx([0.5, 1.0])
