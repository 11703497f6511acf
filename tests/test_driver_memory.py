"""What each part of a job on all images takes beside the catalogue's table: its peak at two sizes."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distributed_rerank import retrieval
from distributed_rerank.data import embeddings as embeddings_module
from distributed_rerank.data import texts, vectors
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.evaluation.embedding_metrics import embedding_metrics
from distributed_rerank.extraction import check_complete
from distributed_rerank.tensors import oml_metrics

SMALL, LARGE = 4_096, 24_576
ROWS = 512
"""Images that are looked at together here: fewer than either size, so that what a block takes is the same for both."""
MOST_BYTES = 5.0
"""An image: one array of numbers of 4 bytes."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vectors, embeddings_module):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", ROWS)
    for module in (texts, oml_metrics):
        monkeypatch.setattr(module, "ROWS", ROWS)


def _peaks(folder: Path, n_images: int) -> dict[str, int]:
    """Bytes of NumPy's and Python's memory at the peak of each part; the table is Arrow's and not among them."""
    folder.mkdir()
    number = np.arange(n_images)
    rows = {"path": [f"{at:08d}.jpg" for at in number], "label": number // 8, "category": number % 50}
    rows |= {"split": "validation", "is_query": number % (n_images // 64) == 0, "is_gallery": True}
    pd.DataFrame(rows).to_csv(folder / "df.csv", index=False)
    catalogue = read_catalogue(str(folder / "df.csv"), purpose="evaluation")
    matrix = np.random.default_rng(0).standard_normal((n_images, 4), np.float32)
    write_embeddings(folder / "embeddings.parquet", catalogue.ids, matrix)
    embeddings = read_embeddings(folder / "embeddings.parquet")
    assert len(embeddings) == len(catalogue.labels) == len(catalogue.sequences) == n_images
    parts = {
        "digest": catalogue.digest,
        "complete": lambda: check_complete(embeddings, catalogue, None, folder),
        "sides of the search": lambda: retrieval._sides(catalogue, embeddings),
        "metrics": lambda: embedding_metrics(catalogue, embeddings, (), (0.5,)),
    }
    peaks = {}
    gc.collect()
    for name, run in parts.items():
        tracemalloc.start()
        run()
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peaks


def test_no_part_takes_more_than_one_number_of_each_image(tmp_path: Path) -> None:
    _peaks(tmp_path / "before", 1024)  # what is imported and kept at the first use
    small, large = _peaks(tmp_path / "small", SMALL), _peaks(tmp_path / "large", LARGE)
    each = {name: (large[name] - small[name]) / (LARGE - SMALL) for name in small}
    assert all(value < MOST_BYTES for value in each.values()), each
