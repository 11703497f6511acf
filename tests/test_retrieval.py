from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distributed_rerank import retrieval
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.retrieval import QueryBlock, SearchedBlock, Searcher, SearchSide, retrieve
from distributed_rerank.storage.artifacts import read_manifest
from tests.small_catalogue import make_catalogue

WORK = WorkConfig(queries_per_block=5, tile_size=6)


def _embeddings(catalogue: Catalogue, dim: int = 8) -> Embeddings:
    matrix = np.random.default_rng(0).standard_normal((len(catalogue), dim)).astype(np.float32)
    return Embeddings(catalogue.ids, matrix)


def _literal(matrix: np.ndarray, sequences: np.ndarray, n_items: int) -> list[list[int]]:
    """Candidates of every item by a full sort of all distances."""
    lists = []
    for query, vector in enumerate(matrix.astype(np.float64)):
        distances = np.sqrt(((matrix - vector) ** 2).sum(axis=1)).astype(np.float32)
        same = (sequences == sequences[query]) & (sequences >= 0)
        allowed = [item for item in range(len(matrix)) if item != query and not same[item]]
        lists.append(sorted(allowed, key=lambda item: (distances[item], item))[:n_items])
    return lists


def _with_sequences(catalogue: Catalogue) -> Catalogue:
    names = [f"film {number // 3}" if number % 2 else None for number in range(len(catalogue))]
    return Catalogue(catalogue.table.assign(sequence=names), catalogue.source)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(("queries_per_block", "tile_size"), [(5, 6), (1, 1), (100, 100), (7, 26)])
def test_retrieve_any_blocks_equals_a_full_sort(
    tmp_path: Path, queries_per_block: int, tile_size: int, threads: int
) -> None:
    catalogue = _with_sequences(make_catalogue(tmp_path / "images", 27))
    embeddings = _embeddings(catalogue)
    embeddings.matrix[20] = embeddings.matrix[3]
    work = replace(WORK, queries_per_block=queries_per_block, tile_size=tile_size, threads_per_worker=threads)
    found = retrieve(catalogue, embeddings, 4, tmp_path / "out", work=work)
    assert found.items.tolist() == _literal(embeddings.matrix, catalogue.sequences, 4)
    assert found.query_items.tolist() == list(range(27))


def test_retrieve_items_without_embedding_take_no_part(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 12)
    embeddings = _embeddings(catalogue)
    without = Embeddings(np.delete(embeddings.ids, 5), np.delete(embeddings.matrix, 5, axis=0))
    found = retrieve(catalogue, without, 20, tmp_path / "out", work=WORK)
    assert 5 not in found.query_items
    assert 5 not in found.items
    assert found.items.shape == (11, 10)


def test_retrieve_killed_continues_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 23)
    embeddings = _embeddings(catalogue)
    retrieve(catalogue, embeddings, 4, tmp_path / "whole", work=WORK)

    def dies(
        blocks: list[QueryBlock], queries: SearchSide, gallery: SearchSide, n_items: int, work: WorkConfig
    ) -> Iterator[tuple[int, SearchedBlock]]:
        yield from list(retrieval.search_blocks(blocks, queries, gallery, n_items, work))[3:]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieve(
            catalogue, embeddings, 4, tmp_path / "killed", work=WORK, executors=SimpleNamespace(search_blocks=dies)
        )
    retrieve(catalogue, embeddings, 4, tmp_path / "killed", work=WORK)
    name = "candidates.parquet"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_manifest(tmp_path / "killed")["blocks"] == {"computed": 3, "reused": 2}
    assert len(tables.read_table(tmp_path / "killed", "candidates")) == 23 * 4


def test_retrieve_lost_block_is_an_error(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 23)

    def loses(
        blocks: list[QueryBlock], queries: SearchSide, gallery: SearchSide, n_items: int, work: WorkConfig
    ) -> Iterator[tuple[int, SearchedBlock]]:
        yield from list(retrieval.search_blocks(blocks, queries, gallery, n_items, work))[:-1]

    with pytest.raises(AssertionError, match="never came back"):
        retrieve(
            catalogue,
            _embeddings(catalogue),
            4,
            tmp_path / "out",
            work=WORK,
            executors=SimpleNamespace(search_blocks=loses),
        )


def test_retrieve_other_embeddings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 6)
    embeddings = _embeddings(catalogue)
    retrieve(catalogue, embeddings, 4, tmp_path / "out", work=WORK)
    with pytest.raises(BadInput, match="embeddings"):
        retrieve(catalogue, Embeddings(embeddings.ids, embeddings.matrix * 2), 4, tmp_path / "out", work=WORK)


def test_retrieve_no_embedded_query_is_bad_input(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 6)
    nothing = Embeddings(np.array(["somebody else"], dtype=object), np.ones((1, 8), np.float32))
    with pytest.raises(BadInput, match="no query"):
        retrieve(catalogue, nothing, 4, tmp_path / "out", work=WORK)


def test_tiles_kept_on_the_device_are_sent_once_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does whose memory has room for the first tiles only."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(90, 8, generator=generator).numpy()
    sides = [
        SearchSide(embeddings[start:stop], np.arange(start, stop), np.full(stop - start, -1))
        for start, stop in ((0, 30), (30, 60), (60, 90))
    ]
    queries = SearchSide(embeddings[:20], np.arange(20), np.full(20, -1))
    plain = Searcher(lambda: sides, 5, 1)
    expected = plain.search(queries).lists
    keeping = Searcher(lambda: sides, 5, 1)
    sent: list[int] = []
    send = keeping._tensors
    monkeypatch.setattr(keeping, "_has_room_for", lambda n_bytes: len(keeping._kept) < 2)
    monkeypatch.setattr(keeping, "_tensors", lambda side: (sent.append(int(side.items[0])), send(side))[1])
    for _ in range(2):
        found = keeping.search(queries).lists
        assert torch.equal(found.items, expected.items)
        assert torch.equal(found.distances, expected.distances)
    # the queries (item 0), then the three tiles; the second time the two kept tiles are not sent again
    assert sent == [0, 0, 30, 60, 0, 60]
