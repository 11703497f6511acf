"""From lists and logits to rankings: small lists written out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_catalogue import distance_model, make_catalogue

from distributed_rerank.chain.chain import Chain, KReciprocalStep, PairwiseStep
from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.data.rejects import Reject
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import check_complete
from distributed_rerank.models.saving import save_model
from distributed_rerank.reranking.lists import only_gallery, without_rejected
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.reranking.rankings import by_logits, rankings
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors.candidate_lists import CandidateLists

NAN, INF = float("nan"), float("inf")
REPLACE = Chain((PairwiseStep(top_n=3, rule="replace"),))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Eight items, all of them query and gallery."""
    return make_catalogue(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(distance_model(), tmp_path_factory.mktemp("model"))


def lists(rows: dict[int, list[int]]) -> CandidateLists:
    """Candidates of these queries at the distances 1, 2, 3, ..., padded to the longest list."""
    width = max(map(len, rows.values()))
    items = np.array([[*row, *[-1] * (width - len(row))] for row in rows.values()], np.int64)
    distances = np.where(items >= 0, np.arange(1, width + 1), np.inf).astype(np.float32)
    return CandidateLists.from_arrays(np.array(list(rows), np.int64), items, distances)


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def rejected(catalogue: Catalogue, *items: int) -> tuple[Reject, ...]:
    return tuple(Reject(catalogue.ids[item], "", "broken") for item in items)


def test_without_rejected_moves_up_what_stood_behind(catalogue: Catalogue) -> None:
    scored = ScoredLists(
        lists({0: [1, 2, 3, 4], 2: [0, 1, 3], 5: [6, 7, 0, 2]}),
        logits([0.3, NAN, 0.1], [NAN, NAN, NAN], [0.6, 0.5, 0.4]),
        rejected(catalogue, 2),
    )
    found = without_rejected(scored, catalogue)
    assert found.lists.query_items.tolist() == [0, 5]
    assert found.lists.items.tolist() == [[1, 3, 4, -1], [6, 7, 0, -1]]
    assert found.lists.distances.tolist() == [[1, 3, 4, INF], [1, 2, 3, INF]]
    assert found.logits is not None
    torch.testing.assert_close(found.logits, logits([0.3, 0.1, NAN], [0.6, 0.5, 0.4]), rtol=0, atol=0, equal_nan=True)


def test_without_rejected_nothing_rejected_changes_nothing(catalogue: Catalogue) -> None:
    scored = ScoredLists(lists({0: [1, 2]}), logits([0.1, 0.2]))
    assert without_rejected(scored, catalogue) is scored


@pytest.mark.parametrize("rule", ["replace", "fuse"])
def test_by_logits_candidate_that_moved_up_stays_behind_the_scored(rule: str) -> None:
    given = lists({0: [1, 3, 4, 5], 1: [2, 3, 4, 5], 2: [6, 7, 0, 1], 3: [4, 5]})
    values = torch.tensor([[0.9, 0.1, NAN], [0.3, 0.2, 0.1], [NAN, NAN, NAN], [0.2, 0.1, NAN]])
    step = PairwiseStep(top_n=3, rule=rule, weight=0.0)  # pyright: ignore[reportArgumentType]
    found = by_logits(step, given, values)
    assert found.items.tolist() == [[3, 1, 4, 5], [4, 3, 2, 5], [6, 7, 0, 1], [5, 4, -1, -1]]
    assert bool((found.distances[:, 1:] >= found.distances[:, :-1]).all())


def test_rankings_curve_re_ranks_each_smaller_top_n(catalogue: Catalogue) -> None:
    scored = ScoredLists(lists({0: [1, 2, 3, 4], 5: [6, 7]}), logits([0.3, 0.2, 0.1], [0.2, 0.1, NAN]))
    queries = torch.tensor([0, 5])
    found = rankings(REPLACE, scored, catalogue, None, queries, curve=(2, 5))
    assert {n: ranking[torch.arange(2)].items.tolist() for n, ranking in found.items()} == {
        2: [[2, 1, 3, 4], [7, 6, -1, -1]],
        3: [[3, 2, 1, 4], [7, 6, -1, -1]],
    }
    assert found[3][torch.tensor([1, 0])].items.tolist() == [[7, 6, -1, -1], [3, 2, 1, 4]]
    assert list(rankings(REPLACE, scored, catalogue, None, queries, curve=())) == [3]


def test_rankings_of_a_query_without_a_list_are_empty(catalogue: Catalogue) -> None:
    scored = ScoredLists(lists({0: [1, 2], 5: [6, 7]}), logits([0.3, 0.2], [0.2, 0.1]))
    found = rankings(REPLACE, scored, catalogue, None, torch.tensor([0, 3, 5, 6]), curve=())
    assert found[3][torch.arange(4)].items.tolist() == [[2, 1], [-1, -1], [7, 6], [-1, -1]]
    assert found[3][torch.tensor([1])].items.tolist() == [[-1, -1]]


def test_rankings_without_steps_are_the_first_stage(catalogue: Catalogue) -> None:
    found = rankings(Chain(), ScoredLists(lists({3: [1, 2, 4]})), catalogue, None, torch.tensor([3]))
    assert {n: ranking[torch.arange(1)].items.tolist() for n, ranking in found.items()} == {3: [[1, 2, 4]]}


def test_rankings_neighbourhood_step_leaves_only_gallery_items(catalogue: Catalogue) -> None:
    table = catalogue.table.assign(is_gallery=[True, True, False, True, True, True, True, True])
    partial = Catalogue(table, catalogue.source)
    every = {item: [other for other in range(8) if other != item] for item in range(8)}
    chain = Chain((KReciprocalStep(k1=3, k2=2, weight=1.0),))
    found = rankings(chain, ScoredLists(lists(every)), partial, None, torch.tensor([0, 5]))
    # with weight 1 the distance alone counts: the order stays, item 2 is gone
    assert found[7][torch.arange(2)].items.tolist() == [[1, 3, 4, 5, 6, 7, -1], [0, 1, 3, 4, 6, 7, -1]]


def test_only_gallery_drops_others_and_keeps_the_order(catalogue: Catalogue) -> None:
    table = catalogue.table.assign(is_gallery=[True, False] * 4)
    given = lists({5: [1, 4, 3, 0], 7: [2, 6]})
    found = only_gallery(given, Catalogue(table, catalogue.source))
    assert found.items.tolist() == [[4, 0, -1, -1], [2, 6, -1, -1]]
    assert found.distances.tolist() == [[2, 4, INF, INF], [1, 2, INF, INF]]


def test_load_model_and_chain_folder_without_chain_means_omls_rule(model_folder: Path) -> None:
    model, chain = load_model_and_chain(RerankerConfig(model=str(model_folder)))
    assert model is not None
    assert chain.steps == (PairwiseStep(top_n=10, rule="replace"),)
    assert load_model_and_chain(RerankerConfig(model=str(model_folder), chain="replace", top_n=4))[1].steps == (
        PairwiseStep(top_n=4, rule="replace"),
    )
    assert load_model_and_chain(RerankerConfig(model=str(model_folder), chain="first_stage"))[1].steps == ()
    assert load_model_and_chain(RerankerConfig()) == (None, Chain())


def test_load_model_and_chain_file_is_read_and_top_n_overrides(model_folder: Path, tmp_path: Path) -> None:
    steps = [{"step": "pairwise", "top_n": 7, "weight": 0.5}, {"step": "k_reciprocal", "k1": 5, "k2": 2}]
    (tmp_path / "mine.json").write_text(json.dumps({"schema_version": 2, "steps": steps}))
    chain = load_model_and_chain(RerankerConfig(model=str(model_folder), chain=tmp_path / "mine.json", top_n=4))[1]
    assert chain.steps == (PairwiseStep(top_n=4, weight=0.5), KReciprocalStep(k1=5, k2=2))


@pytest.mark.parametrize(
    ("has_model", "chain", "top_n", "message"),
    [
        (False, "replace", None, "--chain replace needs a pairwise model"),
        (False, "model", 5, "--top-n 5 needs a pairwise model"),
        (True, "first_stage", 5, "--top-n 5 changes nothing"),
        (True, "replace", 1, "top_n=1 re-ranks nothing"),
    ],
)
def test_load_model_and_chain_useless_arguments_are_refused(
    model_folder: Path, has_model: bool, chain: str, top_n: int | None, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        load_model_and_chain(RerankerConfig(model=str(model_folder) if has_model else None, chain=chain, top_n=top_n))


def test_identify_sees_config_and_weights_not_paths() -> None:
    model, other = distance_model(), distance_model()
    assert model.identity() == other.identity()
    other.config = replace(other.config, output_bias=1.0)
    assert model.identity() != other.identity()
    changed = distance_model()
    with torch.no_grad():
        next(changed.proj.parameters()).add_(1)
    assert model.identity() != changed.identity()
    json.dumps(model.identity())


def test_an_image_without_embedding_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings.parquet", catalogue.ids[:7], np.ones((7, 2), np.float32))
    with pytest.raises(BadInput, match="1 of 8 images have no embedding"):
        check_complete(read_embeddings(tmp_path), catalogue, 0.5, tmp_path)
