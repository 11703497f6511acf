"""Which part of a gallery an approximate search looks at, and what share of the nearest items it finds there.

The gallery is cut into cells around centres. How many cells a query looks into is chosen on a sample of the queries,
and what that misses is measured on another sample, both against exact search.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float64, Int32, Int64
from torch import Tensor

from distributed_rerank.data import tables
from distributed_rerank.data.search_sides import SearchSide, Side, StoredSide
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.storage.artifacts import BlockStore
from distributed_rerank.storage.manifests import MANIFEST, read_manifest
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.candidate_pairs import checked_side
from distributed_rerank.tensors.cells import ITEMS_PER_CELL, Cells, centres_of, fewest_probes, recalls
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.statistics import bootstrap

logger = logging.getLogger(__name__)

N_SAMPLED = 200
"""Queries that the number of cells is chosen on, and as many others that its recall is measured on."""
SearchBlocks = Callable[[str, StoredSide, Side, int, Callable[[CandidateLists], pa.Table]], BlockStore]
"""Searches for the nearest of all queries by blocks, and keeps a table of the lists of each block under a name."""
LARGEST_SHARE = 0.5
"""Of the gallery; a search that meets more of it is as quick as an exact one, and is one."""


def in_cells(
    queries: StoredSide, gallery: StoredSide, n_items: int, recall: float, centres: BlockStore, search: SearchBlocks
) -> tuple[StoredSide, dict[str, Any]]:
    """The gallery ordered by cells that `recall` of the `n_items` nearest are found in, and what was measured.

    The gallery is as it was where that takes more than half of it. Centres are kept in the store of their name, so that
    a run that goes on elsewhere has the same; `search` keeps and continues its results too. There are more queries than
    the two samples have.
    """
    n_cells = round(math.sqrt(len(gallery.items)))
    side = _centres(gallery, n_cells, centres)
    store = search("cells", gallery, side, 1, _items_table)
    # [gallery item]: its cell. Then where each cell begins among the items ordered by cell.
    cells = _items_of(store)[:, 0] - int(side.items[0])
    starts = np.concatenate([[0], np.bincount(cells, minlength=n_cells).cumsum()])
    rows = np.random.default_rng(0).choice(len(queries.items), 2 * N_SAMPLED, replace=False)
    nearest_cells, found = _recalls(queries.chosen(rows), gallery, side, cells, n_items, search)
    # Chosen on one half of the sample, measured on the other.
    n_probes = fewest_probes(found[:N_SAMPLED], recall)
    n_met = np.diff(starts)[nearest_cells[N_SAMPLED:, :n_probes]].sum(axis=1)
    share = float(n_met.mean() / len(gallery.items))
    if share > LARGEST_SHARE:
        n_probes, share = n_cells, 1.0
    (measured,) = bootstrap(found[N_SAMPLED:, n_probes - 1 : n_probes], None, seed=0)
    figures = {"n_items": n_items, "cells": n_cells, "probes": n_probes, "share_of_gallery": share}
    figures |= {"recall": measured.mean, "ci95": [measured.low, measured.high], "n_sampled": N_SAMPLED}
    is_good = measured.mean >= recall and not is_whole(figures)
    logger.log(logging.INFO if is_good else logging.WARNING, "%s; asked for: %g", search_in_words(figures), recall)
    if is_whole(figures):
        return gallery, figures
    found_in = Cells(torch.from_numpy(side.embeddings), torch.from_numpy(starts), n_probes)
    return replace(gallery.chosen(np.argsort(cells, kind="stable")), cells=found_in), figures


def _centres(gallery: StoredSide, n_cells: int, store: BlockStore) -> SearchSide:
    """Centres of cells, fitted to a sample of the gallery; they have no sequence and no item's number."""
    if not store.done():
        n_fitted = min(len(gallery.items), ITEMS_PER_CELL * n_cells)
        rows = np.sort(np.random.default_rng(0).choice(len(gallery.items), n_fitted, replace=False))
        part = gallery.chosen(rows).part(0, n_fitted)
        logger.info("approximate search: fitting %d cells to %d items", n_cells, n_fitted)
        fitted = checked_side(tensor_of(part.embeddings), tensor_of(part.items), None).embeddings
        names = [str(cell) for cell in range(n_cells)]
        store.write(0, tables.embeddings_table(names, centres_of(fitted, n_cells).numpy()))
    first = len(gallery.sequences_of)
    matrix = tables.matrix_of(store.read(0)).copy()
    return SearchSide(matrix, np.arange(first, first + n_cells), np.full(n_cells, -1))


def _recalls(
    sample: StoredSide,
    gallery: StoredSide,
    centres: SearchSide,
    cells: Int32[np.ndarray, " item"],
    n_items: int,
    search: SearchBlocks,
) -> tuple[Int64[np.ndarray, "query cell"], Float64[Tensor, "query cell"]]:
    """The cells of each query of the sample, nearest first; and its recall with 1, 2, ... of them, by exact search."""
    exact = _items_of(search("sample", sample, gallery, n_items, _items_table))
    # [item of the catalogue]: its cell; the last entry belongs to item -1.
    cell_of = np.full(len(gallery.sequences_of) + 1, -1, np.int32)
    cell_of[np.asarray(gallery.items)] = cells
    part = sample.part(0, len(sample.items))
    nearest_cells = nearest(
        tensor_of(part.embeddings), torch.from_numpy(centres.embeddings), query_items=tensor_of(part.items),
        gallery_items=torch.from_numpy(centres.items), n_items=len(centres.items),
    ).items - int(centres.items[0])  # fmt: skip
    return nearest_cells.numpy(), recalls(nearest_cells, torch.from_numpy(cell_of[exact]))


def _items_table(lists: CandidateLists) -> pa.Table:
    items = pa.array(lists.items.int().numpy().reshape(-1))
    return pa.table({"items": pa.FixedSizeListArray.from_arrays(items, lists.items.shape[1])})


def _items_of(store: BlockStore) -> Int32[np.ndarray, "query k"]:
    """The items of all blocks of `_items_table`."""
    columns = [table["items"].combine_chunks() for table in store.tables()]
    return np.concatenate([column.flatten().to_numpy().reshape(len(column), -1) for column in columns])


def is_whole(figures: Mapping[str, Any]) -> bool:
    """Whether queries meet all cells, so that the search is exact."""
    return figures["probes"] == figures["cells"]


def search_in_words(figures: Mapping[str, Any]) -> str:
    """What an approximate search looks at and finds, by the figures in its manifest."""
    if is_whole(figures):
        return "exact search, for an approximate one would look at more than half of the gallery"
    low, high = figures["ci95"]
    return (
        f"approximate search in {figures['probes']} of {figures['cells']:,} cells, "
        f"{100 * figures['share_of_gallery']:.2g} % of the gallery: recall of the {figures['n_items']} nearest "
        f"{figures['recall']:.3f} (95 % interval {low:.3f} to {high:.3f}, {figures['n_sampled']} queries against exact "
        "search)"
    )


def approximate_searches(run: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each approximate search in a run's folder, by the name of its folder."""
    manifests = {path.parent.name: read_manifest(path.parent) for path in sorted(run.glob(f"[!.]*/{MANIFEST}"))}
    return {name: manifest["search"] for name, manifest in manifests.items() if "search" in manifest}
