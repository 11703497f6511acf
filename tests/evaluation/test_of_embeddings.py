"""pcf and fnmr@fmr of a catalogue's embeddings, against loops over all pairs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distributed_rerank.data.catalogue import Catalogue, read_catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.evaluation.of_embeddings import figures_of_embeddings


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    generator = np.random.default_rng(2)
    rows = [
        (f"{n:02d}.png", n % 5, "validation", n % 3 != 1, n % 3 != 2, "ab"[n % 2], generator.integers(4) or None)
        for n in range(24)
    ]
    columns = ["path", "label", "split", "is_query", "is_gallery", "category", "sequence"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "df.csv", index=False)
    return read_catalogue(str(tmp_path / "df.csv"))


def test_figures_are_those_of_a_loop_over_all_pairs(catalogue: Catalogue) -> None:
    matrix = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    found = figures_of_embeddings(catalogue, Embeddings(catalogue.ids, matrix))
    assert set(found["categories"]) == {"a", "b"}
    for name, figures in [("", found["all"]), *found["categories"].items()]:
        own = [n for n in range(24) if not name or catalogue.categories[n] == name]  # pyright: ignore
        positive, negative = [], []
        for query in set(own) & set(catalogue.query_items.tolist()):
            for item in catalogue.gallery_items.tolist():
                sequence = catalogue.sequences[query]
                if query == item or (sequence >= 0 and sequence == catalogue.sequences[item]):
                    continue
                distance = np.linalg.norm(matrix[query].astype(float) - matrix[item])
                (positive if catalogue.labels[query] == catalogue.labels[item] else negative).append(distance)
        threshold = np.quantile(negative, 0.1)
        assert figures["fnmr@fmr=0.1"] == pytest.approx(np.mean(np.array(positive) >= threshold))
        centred = matrix[own] - matrix[own].mean(axis=0)
        explained = np.cumsum(np.linalg.svd(centred, compute_uv=False).astype(float) ** 2)
        n_axes = int((explained / explained[-1] <= 0.5).sum()) + 1
        assert figures["pcf@0.5"] == pytest.approx(n_axes / 6)


def test_figures_that_do_not_exist_are_absent(catalogue: Catalogue) -> None:
    one = catalogue.take(np.array([0]))
    assert figures_of_embeddings(one, Embeddings(one.ids, np.ones((1, 3), np.float32)))["all"] == {}
