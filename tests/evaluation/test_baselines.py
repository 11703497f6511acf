"""Baselines without training against literal dense definitions, and the reasons why one is skipped."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_catalogue import EXTRACTOR, make_catalogue, make_lists

from distributed_rerank.chain.apply import apply_k_reciprocal
from distributed_rerank.chain.chain import Chain, KReciprocalStep, PairwiseStep
from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.images import read_image
from distributed_rerank.evaluation import baselines
from distributed_rerank.evaluation.measure import count_relevant
from distributed_rerank.evaluation.ranked import Ranked, rank
from distributed_rerank.extraction import Embeddings
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.reranking.lists import FirstStage
from distributed_rerank.retrieval import retrieve
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors import metrics
from distributed_rerank.tensors.candidate_lists import CandidateLists

N_ITEMS, N_QUERIES, N_LISTED = 60, 20, 40
WORK = WorkConfig(queries_per_block=7)
ALONE = {"k_reciprocal", "query_expansion", "database_augmentation", "both_expansions"}


def catalogue_of(folder: Path, is_split: bool) -> Catalogue:
    """60 items of 10 labels; with `is_split` the first 20 are queries and the rest is the gallery; one sequence."""
    rows = [
        (f"{n:02d}.png", n % 10, "validation", not is_split or n < N_QUERIES, not is_split or n >= N_QUERIES,
         "s" if n in (3, 23) else "")
        for n in range(N_ITEMS)
    ]  # fmt: skip
    columns = ["path", "label", "split", "is_query", "is_gallery", "sequence"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "df.csv", index=False)
    return read_catalogue(str(folder / "df.csv"), purpose="evaluation")


def embeddings_of(catalogue: Catalogue) -> Embeddings:
    """Noisy directions of the labels, of norm 1."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(10, 8))
    matrix = centres[catalogue.labels] + 0.9 * generator.normal(size=(N_ITEMS, 8))
    return Embeddings(catalogue.ids, (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32))


def ranked_of(folder: Path, is_split: bool, chain: Chain | None = None) -> Ranked:
    catalogue = catalogue_of(folder, is_split)
    embeddings = embeddings_of(catalogue)
    lists = retrieve(catalogue, embeddings, N_LISTED, folder / "candidates", work=WORK)
    first = FirstStage(catalogue, lists, embeddings, [])
    logits = None
    if chain is not None and chain.pairwise is not None:
        drawn = torch.rand(len(lists), chain.pairwise.top_n, generator=torch.Generator().manual_seed(1))
        logits = torch.where(lists.first(chain.pairwise.top_n).items >= 0, drawn, torch.nan)
    return rank(first, ScoredLists(lists, logits), chain or Chain(), chain is not None)


def found_in(ranked: Ranked, folder: Path) -> baselines.BaselineResults:
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    values = {
        name: metrics.per_query(queries.relevance(ranking), queries.n_relevant)
        for name, ranking in (("before", ranked.before), ("after", ranked.final))
    }
    after = values["after"] if ranked.after else None
    sources = baselines.Sources(ranked, N_LISTED, WORK, None, folder, None)
    return baselines.measure_baselines(queries, values["before"], after, sources, seed=0, n_resamples=50)


def expanded(matrix: np.ndarray, items: np.ndarray, lists: dict[int, list[int]]) -> np.ndarray:
    """Alpha query expansion with k = 5 and alpha = 3 by its definition, one item after the other."""
    rows = []
    for item in items:
        total = matrix[item].astype(np.float64)
        for other in lists[item][:5]:
            total = total + max(0.0, float(matrix[item] @ matrix[other])) ** 3 * matrix[other]
        rows.append(total / np.linalg.norm(total))
    return np.array(rows)


def map_at_10(ranked: Ranked, queries: np.ndarray, gallery: np.ndarray) -> float:
    """mAP@10 of a dense search, without the query and its sequence."""
    catalogue, values = ranked.catalogue, []
    sequences, labels = catalogue.sequences, catalogue.labels
    for row, query in enumerate(ranked.query_items.tolist()):
        own = [
            item == query or (sequences[item] >= 0 and sequences[item] == sequences[query])
            for item in catalogue.gallery_items
        ]
        distances = np.where(own, np.inf, np.linalg.norm(queries[row] - gallery, axis=1))
        order = np.argsort(distances, kind="stable")[: len(own) - sum(own)]
        hits = labels[catalogue.gallery_items[order]] == labels[query]
        precisions = [hits[: place + 1].mean() for place in range(10) if hits[place]]
        values.append(sum(precisions) / min(10, hits.sum()))
    return float(np.mean(values))


def lists_of(lists: CandidateLists, kept: np.ndarray) -> dict[int, list[int]]:
    return {
        query: [item for item in row if item in kept]
        for query, row in zip(lists.query_items.tolist(), lists.items.tolist(), strict=True)
    }


@pytest.mark.parametrize("is_split", [False, True])
def test_expansions_equal_a_dense_search(tmp_path: Path, is_split: bool) -> None:
    ranked = ranked_of(tmp_path, is_split)
    figures = found_in(ranked, tmp_path).figures
    catalogue, embeddings = ranked.catalogue, ranked.first.embeddings
    assert embeddings is not None
    everyone = retrieve(catalogue.as_query_and_gallery(), embeddings, N_LISTED, tmp_path / "everyone", work=WORK)
    lists = lists_of(everyone, catalogue.gallery_items)
    matrix = embeddings.matrix
    queries, gallery = ranked.query_items.numpy(), catalogue.gallery_items
    both = expanded(matrix, queries, lists), expanded(matrix, gallery, lists)
    assert figures["query_expansion"]["metrics"]["map@10"] == pytest.approx(
        map_at_10(ranked, both[0], matrix[gallery]), abs=1e-9
    )
    assert figures["database_augmentation"]["metrics"]["map@10"] == pytest.approx(
        map_at_10(ranked, matrix[queries], both[1]), abs=1e-9
    )
    assert figures["both_expansions"]["metrics"]["map@10"] == pytest.approx(map_at_10(ranked, *both), abs=1e-9)


def test_k_reciprocal_sees_the_lists_of_gallery_items_too(tmp_path: Path) -> None:
    ranked = ranked_of(tmp_path, is_split=True)
    found = found_in(ranked, tmp_path)
    assert ranked.first.embeddings is not None
    everyone = retrieve(
        ranked.catalogue.as_query_and_gallery(), ranked.first.embeddings, N_LISTED, tmp_path / "everyone", work=WORK
    )
    whole = apply_k_reciprocal(KReciprocalStep(), everyone.long())
    cmc = []
    for query in ranked.query_items.tolist():
        best = next(item for item in whole.items[query].tolist() if item in ranked.catalogue.gallery_items)
        cmc.append(float(ranked.catalogue.labels[best] == ranked.catalogue.labels[query]))
    np.testing.assert_array_equal(found.per_query["k_reciprocal"]["cmc@1"].numpy(), cmc)
    assert (tmp_path / "joint_candidates" / "manifest.json").is_file()


def test_baselines_are_compared_with_first_stage_and_chain(tmp_path: Path) -> None:
    chain = Chain((PairwiseStep(top_n=10), KReciprocalStep(k1=8, k2=3)))
    ranked = ranked_of(tmp_path, is_split=False, chain=chain)
    found = found_in(ranked, tmp_path)
    assert set(found.figures) == ALONE | {"pairwise"} | {f"pairwise+{name}" for name in ALONE}
    queries = count_relevant(ranked.catalogue, ranked.query_items)
    before, after = (
        metrics.per_query(queries.relevance(ranking), queries.n_relevant)["map@10"]
        for ranking in (ranked.before, ranked.final)
    )
    for name, entry in found.figures.items():
        own = found.per_query[name]["map@10"]
        assert entry["metrics"]["map@10"] == pytest.approx(float(own.mean()))
        assert entry["difference"]["map@10"]["mean"] == pytest.approx(float((own - before).mean()))
        assert entry["against_reranked"]["map@10"]["mean"] == pytest.approx(float((own - after).mean()))
    assert set(found.seconds) == set(found.figures) - {"pairwise"}
    assert set(baselines.columns(found)) >= {"map@10_k_reciprocal", "cmc@1_pairwise+query_expansion"}


def test_baselines_that_cannot_be_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = ranked_of(tmp_path, is_split=True, chain=Chain((PairwiseStep(top_n=10),)))
    figures = found_in(ranked, tmp_path).figures
    assert "does not score" in figures["pairwise+k_reciprocal"]["skipped"]
    assert "metrics" in figures["pairwise+query_expansion"]
    bare = replace(ranked, first=replace(ranked.first, embeddings=None))
    figures = found_in(bare, tmp_path / "bare").figures
    assert all("give --embeddings or --extractor" in figures[name]["skipped"] for name in ALONE)
    monkeypatch.setattr(baselines, "MAX_ITEMS", 50)
    assert "here are 60" in found_in(ranked, tmp_path).figures["k_reciprocal"]["skipped"]


def test_maxsim_orders_the_first_candidates_by_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 12)
    lists = make_lists(catalogue, 5)
    model = TokenSiamese(TokenSiameseConfig(extractor=EXTRACTOR, grid=2, token_dim=8, global_dim=8, pools=(1,)))
    ranked = rank(FirstStage(catalogue, lists, None, []), ScoredLists(lists), Chain(), has_model=False)
    queries = count_relevant(catalogue, ranked.query_items)
    before = metrics.per_query(queries.relevance(ranked.before), queries.n_relevant)
    sources = baselines.Sources(ranked, 100, WorkConfig(), model, tmp_path, None)

    def measured() -> baselines.BaselineResults:
        return baselines.measure_baselines(queries, before, None, sources, seed=0, n_resamples=10)

    found = measured().per_query["maxsim"]["cmc@1"].tolist()
    with torch.inference_mode():
        pixels = torch.stack([model.transform(read_image(ref)) for ref in catalogue.images()])
        encoded = model.encode(pixels)
        for query, items in enumerate(lists.items):
            listed = items[items >= 0]
            similarity = model.best_match(encoded[[query] * len(listed)], encoded[listed])
            best = int(listed[similarity.argmax()])
            assert found[query] == float(catalogue.labels[best] == catalogue.labels[query])
    monkeypatch.setattr(baselines, "MAX_ENCODED", 11)
    assert "a second time" in measured().figures["maxsim"]["skipped"]
