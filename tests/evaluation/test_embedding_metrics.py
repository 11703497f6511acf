"""fnmr@fmr and pcf of a catalogue, against NumPy over every pair."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation import embedding_metrics as module

N = 90


def drawn_catalogue(folder: Path) -> Catalogue:
    rng = np.random.default_rng(3)
    table = pd.DataFrame(
        {
            "path": [f"{i:02d}.png" for i in range(N)],
            "label": [f"label {i % 9}" for i in range(N)],
            "category": [f"kind {i % 2}" for i in range(N - 1)] + ["alone"],
            "sequence": rng.integers(0, 30, N),
            "split": "validation",
            "is_query": np.arange(N) % 3 > 0,
            "is_gallery": np.arange(N) % 3 != 1,
        }
    )
    table.to_csv(folder / "df.csv", index=False)
    return read_catalogue(str(folder / "df.csv"), purpose="evaluation")


def embeddings_of(catalogue: Catalogue) -> Embeddings:
    matrix = np.random.default_rng(4).normal(size=(N, 6)).astype(np.float32) + catalogue.labels[:, None] % 4
    return Embeddings(catalogue.ids, matrix.astype(np.float32))


def pcf_by_singular_values(matrix: np.ndarray, variance: float) -> float:
    explained = np.cumsum(np.linalg.svd(matrix - matrix.mean(0), compute_uv=False) ** 2)
    return float(np.searchsorted(explained / explained[-1], variance, side="right") + 1) / matrix.shape[1]


def test_figures_are_those_of_all_pairs_without_self_and_sequence(tmp_path: Path) -> None:
    catalogue = drawn_catalogue(tmp_path)
    embeddings = embeddings_of(catalogue)
    found = module.embedding_metrics(catalogue, embeddings, (0.1, 0.5), (0.5, 0.9))
    matrix = embeddings.matrix[embeddings.rows_of(catalogue.ids)].astype(np.float64)
    pairs = [
        (np.linalg.norm(matrix[q] - matrix[g]), catalogue.labels[q] == catalogue.labels[g])
        for q in catalogue.query_items
        for g in catalogue.gallery_items
        if q != g and catalogue.sequences[q] != catalogue.sequences[g]
    ]
    positive, negative = (np.array([d for d, same in pairs if same is np.bool_(kind)]) for kind in (True, False))
    for fmr in (0.1, 0.5):
        expected = np.mean(positive >= np.quantile(negative, fmr))
        assert found[f"fnmr@fmr={fmr:g}"] == pytest.approx(expected)
    for variance in (0.5, 0.9):
        assert found[f"pcf@{variance:g}"] == pytest.approx(pcf_by_singular_values(matrix, variance))
        rows = np.flatnonzero(catalogue.category_names[catalogue.categories] == "kind 1")
        by_category = found["categories"]
        assert by_category["kind 1"][f"pcf@{variance:g}"] == pytest.approx(
            pcf_by_singular_values(matrix[rows], variance)
        )
    assert set(by_category) == {"kind 0", "kind 1"}


def test_fmrs_without_embeddings_or_of_too_many_pairs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = drawn_catalogue(tmp_path)
    module.check_fmrs(catalogue, has_embeddings=True)
    with pytest.raises(BadInput, match="--fmrs needs embeddings"):
        module.check_fmrs(catalogue, has_embeddings=False)
    monkeypatch.setattr(module, "MOST_PAIRS", 100)
    with pytest.raises(BadInput, match="leave --fmrs out"):
        module.check_fmrs(catalogue, has_embeddings=True)
