"""Approximate search against brute force: what it looks at, what it finds, and the same bytes however it is done."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distributed_rerank import approximate, retrieval
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.retrieval import QueryBlock, SearchedBlock, retrieve
from distributed_rerank.storage.artifacts import read_manifest
from distributed_rerank.tensors.cells import fewest_probes, recalls
from tests.small_catalogue import planted_embeddings, write_table

N_IMAGES, N_QUERIES, N_ITEMS, RECALL = 6000, 1000, 20, 0.9
WORK = WorkConfig(queries_per_block=256, tile_size=1111)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return write_table(tmp_path_factory.mktemp("catalogue"), N_IMAGES)


@pytest.fixture(scope="module")
def embeddings(catalogue: Catalogue) -> Embeddings:
    return Embeddings(catalogue.ids, planted_embeddings(N_IMAGES))


@pytest.fixture(scope="module")
def found(catalogue: Catalogue, embeddings: Embeddings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an approximate search in this process."""
    folder = tmp_path_factory.mktemp("approximate") / "out"
    retrieve(catalogue, embeddings, N_ITEMS, folder, recall=RECALL, work=WORK)
    return folder


def by_brute_force(matrix: np.ndarray, sequences: np.ndarray, query: int, among: np.ndarray) -> list[tuple[float, int]]:
    """(distance, item) of these items by float64, without the query and its sequence, in order."""
    among = among[(among != query) & ((sequences[among] != sequences[query]) | (sequences[among] < 0))]
    wide = matrix.astype(np.float64)
    distances = np.sqrt(((wide[among] - wide[query]) ** 2).sum(axis=1)).astype(np.float32)
    return sorted(zip(distances.tolist(), among.tolist(), strict=True))


def test_what_is_found_has_the_distances_of_exact_search_and_the_recall_that_is_told(
    catalogue: Catalogue, embeddings: Embeddings, found: Path, tmp_path: Path
) -> None:
    told = read_manifest(found)["search"]
    exact = retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "exact", work=WORK)
    lists = retrieve(catalogue, embeddings, N_ITEMS, found, recall=RECALL, work=WORK)
    assert torch.equal(lists.query_items, exact.query_items)
    shares = []
    for row in range(0, N_QUERIES, 3):
        query = int(lists.query_items[row])
        whole = by_brute_force(embeddings.matrix, catalogue.sequences, query, np.arange(N_IMAGES))
        distance_of = {item: distance for distance, item in whole}
        items, distances = lists.items[row].tolist(), lists.distances[row].tolist()
        assert distances == [distance_of[item] for item in items], "bit by bit"
        assert list(zip(distances, items, strict=True)) == sorted(zip(distances, items, strict=True))
        assert exact.items[row].tolist() == [item for _, item in whole[:N_ITEMS]]
        shares.append(len(set(items) & set(exact.items[row].tolist())) / N_ITEMS)
    assert told["probes"] < told["cells"] == 77, "it is no exact search"
    assert told["share_of_gallery"] < 0.5
    assert told["ci95"][0] <= told["recall"] <= told["ci95"][1]
    assert told["ci95"][0] - 0.01 <= np.mean(shares) <= told["ci95"][1] + 0.01
    assert RECALL - 0.03 < told["recall"] < RECALL + 0.05, "no more cells than it takes"


def test_a_query_finds_the_nearest_of_the_items_in_its_cells(
    catalogue: Catalogue, embeddings: Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    galleries = []
    make = approximate.in_cells
    monkeypatch.setattr(retrieval, "in_cells", lambda *a: (galleries.append(make(*a)), galleries[-1])[1])
    lists = retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "out", recall=RECALL, work=WORK)
    gallery = galleries[0][0]
    cells, items = gallery.cells, np.asarray(gallery.items)
    assert sorted(items.tolist()) == list(range(N_IMAGES))
    centres = cells.centres.double().numpy()
    for row in range(0, N_QUERIES, 9):
        query = int(lists.query_items[row])
        away = np.sqrt(((centres - embeddings.matrix[query].astype(np.float64)) ** 2).sum(axis=1)).astype(np.float32)
        probed = np.lexsort((np.arange(len(away)), away))[: cells.n_probes]
        among = np.concatenate([items[cells.starts[cell] : cells.starts[cell + 1]] for cell in probed])
        nearest = by_brute_force(embeddings.matrix, catalogue.sequences, query, among)[:N_ITEMS]
        if len(nearest) == N_ITEMS:
            assert lists.items[row].tolist() == [item for _, item in nearest]


def test_lists_that_cells_cannot_fill_are_filled_by_exact_search(catalogue: Catalogue, tmp_path: Path) -> None:
    """A film whose photos fill all cells near them: none of them may answer another."""
    is_film, matrix = np.arange(N_IMAGES) < 1500, planted_embeddings(N_IMAGES)
    matrix[is_film] += 1000
    filmed = Catalogue(catalogue.table.assign(sequence=np.where(is_film, "film", None)), catalogue.source)
    embeddings = Embeddings(catalogue.ids, matrix)
    lists = retrieve(filmed, embeddings, N_ITEMS, tmp_path / "out", recall=0.5, work=WORK)
    assert read_manifest(tmp_path / "out")["search"]["share_of_gallery"] < 0.1
    for row in range(0, 250, 25):
        query = int(lists.query_items[row])
        assert is_film[query]
        nearest = by_brute_force(matrix, filmed.sequences, query, np.arange(N_IMAGES))[:N_ITEMS]
        assert lists.items[row].tolist() == [item for _, item in nearest]


def test_tiles_and_threads_change_no_byte(
    catalogue: Catalogue, embeddings: Embeddings, found: Path, tmp_path: Path
) -> None:
    work = replace(WORK, tile_size=65_536, threads_per_worker=2)
    retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "out", recall=RECALL, work=work)
    name = "candidates.parquet"
    assert (tmp_path / "out" / name).read_bytes() == (found / name).read_bytes()
    assert read_manifest(tmp_path / "out")["search"] == read_manifest(found)["search"]


@pytest.mark.parametrize("dies_at", [0, 1, 2], ids=["cells", "sample", "candidates"])
def test_a_search_that_was_killed_goes_on_to_the_same_bytes(
    catalogue: Catalogue, embeddings: Embeddings, found: Path, tmp_path: Path, dies_at: int
) -> None:
    calls = iter(range(3))

    def dies(
        blocks: list[QueryBlock], queries: object, gallery: object, n_items: int, work: WorkConfig
    ) -> Iterator[tuple[int, SearchedBlock]]:
        results = list(retrieval.search_blocks(blocks, queries, gallery, n_items, work))  # pyright: ignore
        is_last = next(calls) == dies_at
        yield from results[1:] if is_last else results
        if is_last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieve(
            catalogue, embeddings, N_ITEMS, tmp_path / "out", recall=RECALL, work=WORK,
            executors=SimpleNamespace(search_blocks=dies),
        )  # fmt: skip
    retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "out", recall=RECALL, work=WORK)
    name = "candidates.parquet"
    assert (tmp_path / "out" / name).read_bytes() == (found / name).read_bytes()
    assert read_manifest(tmp_path / "out")["search"] == read_manifest(found)["search"]
    assert read_manifest(tmp_path / "out")["blocks"]["reused"] >= 1


def test_embeddings_without_cells_are_searched_exactly_and_that_is_said(
    catalogue: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).standard_normal((N_IMAGES, 64)).astype(np.float32)
    embeddings = Embeddings(catalogue.ids, noise)
    lists = retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "out", recall=0.99, work=WORK)
    exact = retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "exact", work=WORK)
    assert torch.equal(lists.items, exact.items)
    told = read_manifest(tmp_path / "out")["search"]
    assert (told["probes"], told["recall"]) == (77, 1.0)
    assert any("exact search, for an approximate one would look at more than half" in text for text in caplog.messages)


def test_few_queries_are_searched_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalogue = write_table(tmp_path, 600)
    embeddings = Embeddings(catalogue.ids, planted_embeddings(600))
    caplog.set_level(logging.INFO)
    lists = retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "out", recall=0.5, work=WORK)
    exact = retrieve(catalogue, embeddings, N_ITEMS, tmp_path / "exact", work=WORK)
    assert torch.equal(lists.items, exact.items)
    assert "search" not in read_manifest(tmp_path / "out")
    assert any("100 queries: as few are searched for exactly" in text for text in caplog.messages)


def test_evaluation_and_its_report_tell_the_recall(catalogue: Catalogue, found: Path, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings.parquet", catalogue.ids, planted_embeddings(N_IMAGES))
    config = FirstStageConfig(
        embeddings=tmp_path / "embeddings.parquet", n_items=N_ITEMS, search="approximate", min_recall=RECALL
    )
    metrics = evaluate(catalogue, config, tmp_path / "out", measure=MeasureConfig(baselines=False), work=WORK)
    told = read_manifest(found)["search"]
    assert metrics["search"] == {"candidates": told}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["search"]["candidates"] == told
    low, high = told["ci95"]
    sentence = f"recall of the 20 nearest {told['recall']:.3f} (95 % interval {low:.3f} to {high:.3f}, 200 queries"
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(BadInput, match="recall"):
        evaluate(
            catalogue, replace(config, search="exact"), tmp_path / "out", measure=MeasureConfig(baselines=False),
            work=WORK,
        )  # fmt: skip


def test_recall_by_hand() -> None:
    nearest_cells = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2]])
    cells_of_nearest = torch.tensor([[2, 2, 1, 0], [1, 0, -1, -1], [-1, -1, -1, -1]])
    found = recalls(nearest_cells, cells_of_nearest)
    assert found.tolist() == [[0.5, 0.75, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert [fewest_probes(found, least) for least in (0.1, 2 / 3, 0.67, 0.9166, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_without_faiss_it_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FirstStageConfig(search="approximate").recall == 0.95
    assert FirstStageConfig(min_recall=0.5).recall is None
    with pytest.raises(BadInput, match=r"min_recall=1\.5 is no share"):
        FirstStageConfig(min_recall=1.5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BadInput, match=r"needs faiss: pip install 'distributed-rerank\[approximate\]'"):
        FirstStageConfig(search="approximate")
