"""OML's two figures of the embeddings themselves, over all queries and in each category: pcf and fnmr@fmr."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.tensors.oml_metrics import fnmr_at_fmr, pcf

VARIANCES = (0.5,)
FMRS = (0.1,)
"""OML's defaults."""
MOST_PAIRS = 20_000_000
"""All distances of a query and a gallery item are held, so larger catalogues have no fnmr@fmr."""


def figures_of_embeddings(catalogue: Catalogue, embeddings: Embeddings) -> dict[str, Any]:
    """`{"all": {...}, "categories": {name: {...}}}`: pcf of the embeddings, fnmr@fmr of all pairs of query and gallery.

    An item is no pair with itself or its own sequence. A figure that does not exist (fewer than two embeddings, no
    positive or no negative pair, more than `MOST_PAIRS`) is absent.
    """
    matrix = torch.from_numpy(embeddings.matrix[embeddings.rows_of(catalogue.ids)])
    everyone = np.arange(len(catalogue))
    found: dict[str, Any] = {"all": _figures(catalogue, matrix, everyone, catalogue.query_items), "categories": {}}
    if catalogue.categories is not None:
        for name in np.unique(catalogue.categories.astype(str)):
            own = np.flatnonzero(catalogue.categories == name)
            queries = np.intersect1d(own, catalogue.query_items)
            found["categories"][str(name)] = _figures(catalogue, matrix, own, queries)
    return found


def _figures(catalogue: Catalogue, matrix: Tensor, items: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    figures = pcf(matrix[torch.from_numpy(items)], VARIANCES) if len(items) > 1 else {}
    gallery = catalogue.gallery_items
    if not 0 < len(queries) * len(gallery) <= MOST_PAIRS:
        return figures
    labels, sequences = (torch.from_numpy(codes) for codes in (catalogue.labels, catalogue.sequences))
    query, item = torch.from_numpy(queries), torch.from_numpy(gallery)
    # [query, gallery]: whether the two are a pair, and whether one of the same label.
    own = sequences[query][:, None]
    is_pair = (query[:, None] != item) & ~((own >= 0) & (own == sequences[item]))
    is_same = labels[query][:, None] == labels[item]
    distances = torch.cdist(matrix[query].double(), matrix[item].double())
    positive, negative = distances[is_pair & is_same], distances[is_pair & ~is_same]
    if not len(positive) or not len(negative):
        return figures
    return figures | fnmr_at_fmr(positive, negative, FMRS)
