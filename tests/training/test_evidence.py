"""Lists that a chain is chosen on, in a gallery with labels that the extractor has seen."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.training import evidence
from distributed_rerank.training.evidence import drawn_labels, evidence_beside_seen

N_LABELS, N_IMAGES, N_SEEN = 12, 5, 8


@pytest.fixture
def catalogue() -> Catalogue:
    """Labels 0 to 7 are seen; images of all labels lie between one another by id."""
    labels = [str(label) for label in range(N_LABELS)] * N_IMAGES
    ids = [f"{number:03d}" for number in range(len(labels))]
    table = pd.DataFrame({"id": ids, "label": labels, "path": ids, "split": "train", "is_query": True})
    return Catalogue(table.assign(is_gallery=True), "planted.csv")


@pytest.fixture
def points(catalogue: Catalogue) -> np.ndarray:
    state = np.random.default_rng(0)
    centres = state.standard_normal((N_LABELS, 6))
    return (centres[catalogue.labels] + state.standard_normal((len(catalogue), 6))).astype(np.float32)


def embed_from(catalogue: Catalogue, points: np.ndarray, lost: int) -> Callable[[Catalogue], Embeddings]:
    def embed(images: Catalogue) -> Embeddings:
        items = catalogue.items_of(images.ids)
        items = items[items != lost]
        return Embeddings(catalogue.ids[items], points[items])

    return embed


def test_seen_labels_are_candidates_and_never_queries(catalogue: Catalogue, points: np.ndarray, tmp_path: Path) -> None:
    is_seen = np.asarray(catalogue.labels) < N_SEEN
    images, seen = (catalogue.take(np.flatnonzero(part)) for part in (~is_seen, is_seen))
    lost = int(np.flatnonzero(is_seen)[3])
    embed = embed_from(catalogue, points, lost)
    config = TrainingConfig(n_items=20, top_n=20)
    found = evidence_beside_seen(catalogue, images, seen, embed, config, tmp_path / "lists", None)
    kept = np.delete(np.arange(len(catalogue)), lost)
    assert np.array_equal(kept[found.queries.numpy()], np.flatnonzero(~is_seen))
    exact = np.linalg.norm(points[kept, None].astype(np.float64) - points[kept].astype(np.float64), axis=2)
    np.fill_diagonal(exact, np.inf)
    assert np.array_equal(found.lists.items.numpy(), np.argsort(exact, axis=1, kind="stable")[:, :20])
    assert set(found.n_relevant[found.queries].tolist()) == {N_IMAGES - 1}
    assert is_seen[kept[found.lists.items[found.queries].numpy()]].any()


@pytest.mark.parametrize(("most", "expected"), [(12, 2), (1000, N_SEEN), (4, 0)])
def test_labels_beside_are_whole_and_no_more_than_asked(catalogue: Catalogue, most: int, expected: int) -> None:
    seen = catalogue.take(np.flatnonzero(np.asarray(catalogue.labels) < N_SEEN))
    drawn = drawn_labels(seen, most, seed=4)
    _, counts = np.unique(drawn.labels, return_counts=True)
    assert (len(counts), set(counts)) == (expected, {N_IMAGES} if expected else set())
    assert evidence.MAX_BESIDE >= 10_000
