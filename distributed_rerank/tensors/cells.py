"""Cells of a gallery for approximate search: an item lies in the cell of its nearest centre, a query looks into a few.

Within the cells that it looks into, a search is exact (`knn.search_cells`). What it misses lies in other cells, so the
recall for any number of cells follows from one exact search.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int, Int64
from torch import Tensor

N_ROUNDS = 10
ITEMS_PER_CELL = 64
"""Items for each centre that centres are fitted to; more of them give hardly better ones."""


@dataclass(frozen=True)
class Cells:
    """How a gallery that is ordered by (cell, item) is searched in part."""

    centres: Float32[Tensor, "cell dim"]
    starts: Int64[Tensor, " cell_ends"]
    """Row of the gallery that each cell begins with; last, the number of its rows."""
    n_probes: int
    """Cells that a query looks into: those of its nearest centres."""


def centres_of(items: Float32[Tensor, "item dim"], n_cells: int) -> Float32[Tensor, "cell dim"]:
    """Centres of k-means by faiss, on one thread and with a fixed seed: the same bits on CPUs of one kind."""
    import faiss

    kmeans = faiss.Kmeans(
        items.shape[1], n_cells, niter=N_ROUNDS, seed=0, min_points_per_centroid=1, max_points_per_centroid=len(items)
    )
    n_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans.train(items.numpy())
    finally:
        faiss.omp_set_num_threads(n_threads)
    return torch.from_numpy(kmeans.centroids)


def recalls(
    nearest_cells: Int64[Tensor, "query cell"], cells_of_nearest: Int[Tensor, "query k"]
) -> Float64[Tensor, "query cell"]:
    """The share of each query's nearest items that a search in its first 1, 2, ... cells finds.

    `nearest_cells` has all cells, the nearest centre first; `cells_of_nearest` the cells of the nearest items by exact
    search, -1 where there are no more. A query without any item has recall 1.
    """
    is_item = cells_of_nearest >= 0
    # [query, cell]: how near each cell is, 0 = the nearest; then [query, k]: that of each item's cell.
    places = nearest_cells.argsort(dim=1).gather(1, cells_of_nearest.long().clamp(min=0))
    found = torch.zeros(nearest_cells.shape, dtype=torch.float64).scatter_add_(1, places, is_item.double())
    n_items = is_item.sum(dim=1, keepdim=True)
    return torch.where(n_items > 0, found.cumsum(dim=1) / n_items.clamp(min=1), 1.0)


def fewest_probes(found: Float64[Tensor, "query cell"], least: float) -> int:
    """The fewest cells at which the mean of `recalls` reaches `least`; all of them find everything."""
    is_enough = found.mean(dim=0) >= least - 1e-9
    is_enough[-1] = True
    return int(is_enough.nonzero()[0, 0]) + 1
