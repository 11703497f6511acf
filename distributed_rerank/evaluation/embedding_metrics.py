"""OML's figures of the embeddings themselves: pcf, and fnmr@fmr over all pairs of a query and a gallery item."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import oml_metrics, sharding

MOST_PAIRS = 200_000_000
"""Distances that fnmr@fmr may keep, 8 bytes each."""
QUERIES_PER_BLOCK = 256


def check_fmrs(catalogue: Catalogue, has_embeddings: bool) -> None:
    """Raises BadInput where fnmr@fmr cannot be measured: without embeddings, or for more pairs than `MOST_PAIRS`."""
    if not has_embeddings:
        raise BadInput("--fmrs needs embeddings: give --embeddings or --extractor, or leave --fmrs out")
    n_pairs = len(catalogue.query_items) * catalogue.n_gallery
    if n_pairs > MOST_PAIRS:
        raise BadInput(f"--fmrs needs all {n_pairs:,} distances, above {MOST_PAIRS:,}; leave --fmrs out")


def embedding_metrics(
    catalogue: Catalogue, embeddings: Embeddings, fmrs: tuple[float, ...], variances: tuple[float, ...]
) -> dict[str, Any]:
    """`pcf@v` of all embeddings of the catalogue, by category under "categories", and `fnmr@fmr=r` of all its pairs.

    A pair is a query and a gallery item, L2 distance; never an item with itself nor with its own sequence. A category
    with fewer than two images has no pcf. Raises BadInput where there is no positive or no negative pair.
    """
    rows = embeddings.rows_of_all(catalogue.ids)

    def pcf(own: np.ndarray | range) -> dict[str, float]:
        parts = sharding.blocks(len(own), oml_metrics.ROWS)
        read = lambda: (torch.from_numpy(embeddings.matrix[own[start:stop]]) for start, stop in parts)  # noqa: E731
        return oml_metrics.pcf_of_parts(read, variances)

    figures: dict[str, Any] = pcf(rows) if len(rows) > 1 else {}
    if catalogue.categories is not None:
        figures["categories"] = {}
        for code in range(-1, len(catalogue.category_names) - 1):
            items = np.flatnonzero(catalogue.categories == code)
            if len(items) > 1:
                own = items if isinstance(rows, range) else rows[items]
                figures["categories"][catalogue.category_names[code]] = pcf(own)
    if fmrs:
        positive, negative = zip(*_distances(catalogue, torch.from_numpy(embeddings.matrix[rows])), strict=True)
        figures |= oml_metrics.fnmr_at_fmr(torch.cat(positive), torch.cat(negative), fmrs)
    return figures


def _distances(catalogue: Catalogue, matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Distances of positive and of negative pairs, some queries at a time."""
    labels, sequences = (tensor_of(codes) for codes in (catalogue.labels, catalogue.sequences))
    gallery = torch.from_numpy(catalogue.gallery_items)
    for queries in torch.from_numpy(catalogue.query_items).split(QUERIES_PER_BLOCK):
        # [query, gallery]
        distances = torch.cdist(matrix[queries].double(), matrix[gallery].double())
        own = sequences[queries][:, None]
        is_left_out = (queries[:, None] == gallery) | ((own >= 0) & (own == sequences[gallery]))
        is_positive = labels[queries][:, None] == labels[gallery]
        yield distances[is_positive & ~is_left_out], distances[~is_positive & ~is_left_out]
