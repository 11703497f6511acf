"""Candidate lists and logits of any number of queries, with planted labels and no images, written block by block."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from distributed_rerank.data import tables
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.texts import Texts
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists

IMAGES_PER_LABEL = 4
FOUND = 0.8
"""How probably a list holds each of the images of its query's label."""
LABELS_PER_CATEGORY = 1000
QUERIES_PER_BLOCK = 10_000


def write_planted(folder: Path, n_queries: int, depth: int) -> tuple[Path, Path]:
    """A catalogue whose images are queries and gallery, and the lists of all; returns both files."""
    ids = Texts([f"images/{number:07d}.jpg" for number in range(n_queries)])
    label = np.arange(n_queries) // IMAGES_PER_LABEL
    columns = {"label": label, "path": ids.tolist(), "split": "validation", "is_query": True, "is_gallery": True}
    table = pd.DataFrame(columns | {"category": [f"category {group}" for group in label // LABELS_PER_CATEGORY]})
    table.to_csv(folder / "df.csv", index=False)
    batches = (candidates_table(lists, ids) for lists in _planted_lists(n_queries, depth))
    tables.write_batches(folder / "candidates.parquet", batches, "candidates")
    return folder / "df.csv", folder / "candidates.parquet"


def _planted_lists(n_queries: int, depth: int) -> Iterator[CandidateLists]:
    """Random items at ascending distances; the images of the query's label at random places of their own."""
    for start, stop in sharding.blocks(n_queries, QUERIES_PER_BLOCK):
        rng = np.random.default_rng(start)
        queries = np.arange(start, stop)[:, None]
        first = queries // IMAGES_PER_LABEL * IMAGES_PER_LABEL
        n_others = n_queries - IMAGES_PER_LABEL
        stride = rng.integers(1, max(2, n_others // depth), queries.shape)
        other = (rng.integers(n_others, size=queries.shape) + stride * np.arange(depth)) % n_others
        items = other + IMAGES_PER_LABEL * (other >= first)
        for number in range(1, IMAGES_PER_LABEL):
            place = rng.integers(depth // IMAGES_PER_LABEL, size=queries.shape) * IMAGES_PER_LABEL + number
            same = first + (queries - first + number) % IMAGES_PER_LABEL
            is_found = rng.random(queries.shape) < FOUND
            np.put_along_axis(items, place, np.where(is_found, same, np.take_along_axis(items, place, 1)), 1)
        distances = np.sort(rng.random(items.shape, dtype=np.float32), axis=1)
        yield CandidateLists.from_arrays(queries[:, 0], items, distances)


def planted_logits(lists: CandidateLists) -> torch.Tensor:
    """Random logits of a block, lower by half of their range for the right candidates."""
    queries, items, _ = lists.arrays()
    is_right = items // IMAGES_PER_LABEL == queries[:, None] // IMAGES_PER_LABEL
    noise = np.random.default_rng(int(queries[0])).random(is_right.shape, dtype=np.float32)
    return torch.from_numpy(noise - np.float32(0.5) * is_right)
