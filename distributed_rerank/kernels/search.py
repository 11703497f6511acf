"""Two steps of exact search for CPUs with AVX-512, compiled from the folder `cpu`: one pass each over what torch reads
and writes several times. Layer 1."""

import ctypes

import torch
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

from distributed_rerank.kernels.library import load_library, pointer

GROUP = 32
"""Entries of which `group_minima` takes the smallest."""


def pair_distances(
    query_embeddings: Float32[Tensor, "query dim"],
    gallery_embeddings: Float32[Tensor, "gallery dim"],
    rows: Int64[Tensor, " pair"],
    columns: Int64[Tensor, " pair"],
) -> Float32[Tensor, " pair"]:
    """L2 distances of query `rows[i]` and gallery item `columns[i]`: differences, squares and their sum in float64."""
    out = torch.empty(len(rows))
    tensors = (query_embeddings, gallery_embeddings, rows, columns)
    assert all(tensor.is_contiguous() for tensor in tensors), "embeddings must lie row after row"
    load_library().pair_distances(
        *map(pointer, tensors), ctypes.c_int64(len(rows)), query_embeddings.shape[1], pointer(out)
    )
    return out


def group_minima(entries: BFloat16[Tensor, "query entry"]) -> Float32[Tensor, "query group"]:
    """The smallest of each 32 entries, the number of which is a multiple of it."""
    assert entries.is_contiguous(), "entries must lie row after row"
    out = torch.empty(len(entries), entries.shape[1] // GROUP)
    load_library().minima_of_32(pointer(entries), ctypes.c_int64(out.numel()), pointer(out))
    return out
