"""Evaluation folders with planted truth: what jobs/evaluate.py leaves, made from rankings of our choice."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from distributed_rerank.data import tables
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.schemas import SCHEMAS
from distributed_rerank.evaluation import measure as evaluation
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import write_json
from distributed_rerank.tensors.candidate_lists import CandidateLists

CATEGORIES = ("books", "cups", "toys")


def planted_catalogue(folder: Path, n_labels: int = 60, with_category: bool = True) -> Catalogue:
    """Labels of four rows each, every row query and gallery, categories in turn; no image exists."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"item {label:03d}-{number}",
            "path": f"{label}_{number}.png",
            "label": f"label {label:03d}",
            "split": "validation",
            "is_query": True,
            "is_gallery": True,
            "category": CATEGORIES[label % len(CATEGORIES)],
        }
        for label in range(n_labels)
        for number in range(4)
    ]
    table = pd.DataFrame(rows)
    (table if with_category else table.drop(columns="category")).to_csv(folder / "table.csv", index=False)
    return read_catalogue(str(folder / "table.csv"), purpose="evaluation")


def planted_ranking(catalogue: Catalogue, miss: dict[str, float], seed: int = 0, width: int = 12) -> CandidateLists:
    """A ranking of every item: relevant items first, but each query of a category misses its first place (an irrelevant
    item comes there) with the probability that `miss` gives the category (absent: 0). Distances have ties."""
    draw = np.random.default_rng(seed).random(len(catalogue))
    labels, categories = catalogue.labels, catalogue.categories
    items = np.empty((len(catalogue), width), np.int64)
    for query in range(len(catalogue)):
        others = np.delete(np.arange(len(catalogue)), query)
        is_relevant = labels[others] == labels[query]
        ordered = np.concatenate([others[is_relevant], others[~is_relevant]])
        category = "" if categories is None else str(catalogue.category_names[categories[query]])
        if draw[query] < miss.get(category, 0.0):
            ordered = np.concatenate([others[~is_relevant][:1], others[is_relevant], others[~is_relevant][1:]])
        items[query] = ordered[:width]
    distances = np.repeat((np.arange(width) // 3 / 4).astype(np.float32)[None], len(catalogue), axis=0)
    return CandidateLists.from_arrays(np.arange(len(catalogue)), items, distances)


def write_run(
    folder: Path,
    catalogue: Catalogue,
    before: CandidateLists,
    after: CandidateLists | None = None,
    model: str = "a" * 64,
) -> dict[str, Any]:
    """The files of an evaluation of these rankings that its readers use; returns the metrics."""
    queries = torch.from_numpy(catalogue.query_items)
    rankings = {} if after is None else {after.items.shape[1]: after}
    measured = evaluation.measure(catalogue, queries, before, rankings, n_resamples=200)
    measured.metrics["n_rejected"] = 0
    fingerprint = artifacts.make_fingerprint("evaluate", catalogue=catalogue.digest(), model=model)
    with artifacts.stage(folder, fingerprint) as staging:
        write_json(staging.path / "metrics.json", measured.metrics)
        per_query = pa.Table.from_pandas(measured.per_query, preserve_index=False)
        tables.write_table(staging.path / "per_query.parquet", per_query, "per_query")
        tables.write_table(staging.path / "rejects.parquet", SCHEMAS["rejects"].empty_table(), "rejects")
        (staging.path / "candidates").mkdir()
        _write_lists(staging.path / "candidates" / "candidates.parquet", catalogue, before)
        if after is not None:
            _write_lists(staging.path / "reranked.parquet", catalogue, after)
        (staging.path / "report.html").write_text("<html><body><main>\n<p>figures</p>\n</main></body></html>\n")
        staging.finish()
    return measured.metrics


def _write_lists(path: Path, catalogue: Catalogue, ranking: CandidateLists) -> None:
    tables.write_table(path, candidates_table(ranking, catalogue.ids), "candidates")
