"""A map of embeddings, fitted to labels in closed form: a search in the mapped space finds more of the right items.

Images of one label differ in some directions more than in others. Whitening within labels shrinks those (WCCN, Hatch et
al. 2006); discriminating also stretches the directions in which labels differ from each other (as linear discriminant
analysis and PLDA do), softly, because few labels do not fill all directions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional

from distributed_rerank.errors import BadInput
from distributed_rerank.models.weights import read_state_dict
from distributed_rerank.storage.files import bytes_digest, write_bytes

ADAPTER = "adapter.safetensors"
Kind = Literal["centre", "whiten", "discriminate"]
SHRINKAGE = 0.4
"""Of the covariance within labels towards a multiple of the identity."""
ROWS = 16_384
"""Embeddings mapped at a time."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """x -> normalize((normalize(x) - mean) @ matrix)."""

    mean: Float64[Tensor, " dim"]
    matrix: Float64[Tensor, "dim dim"]

    def __call__(self, embeddings: Float[np.ndarray, "item dim"]) -> Float32[np.ndarray, "item dim"]:
        """The mapped embeddings, of length 1. Raises BadInput for embeddings of another dimension."""
        if embeddings.shape[1] != len(self.mean):
            raise BadInput(
                f"embeddings have {embeddings.shape[1]} dimensions, the model's adapter takes {len(self.mean)}; "
                "give the embeddings of the extractor that it was trained with"
            )
        blocks = [unit(torch.from_numpy(embeddings[i : i + ROWS])) for i in range(0, len(embeddings), ROWS)]
        return torch.cat([self.mean.new_zeros(0, len(self.mean)), *map(self._map, blocks)]).float().numpy()

    def _map(self, x: Float64[Tensor, "item dim"]) -> Float64[Tensor, "item dim"]:
        return functional.normalize((x - self.mean) @ self.matrix, dim=1)

    def to_bytes(self) -> bytes:
        """The content of its file."""
        return safetensors.torch.save({"mean": self.mean, "matrix": self.matrix.contiguous()})

    def digest(self) -> str:
        """sha256 of its file."""
        return bytes_digest(self.to_bytes())


def unit(embeddings: Float[Tensor, "item dim"]) -> Float64[Tensor, "item dim"]:
    """The embeddings at length 1, in float64."""
    return functional.normalize(embeddings.double(), dim=1)


def fit_adapters(
    embeddings: Float[Tensor, "item dim"], labels: Int64[Tensor, " item"], kinds: Sequence[tuple[Kind, float]]
) -> list[Adapter | None]:
    """An adapter of each (kind, floor), fitted to embeddings and labels (-1 = none); None where that is impossible.

    centre: subtract the mean. whiten: then whiten by the covariance within labels. discriminate: then scale each
    direction by sqrt((b + f) / (1 + b + f)), b the variance of the labels' means along it and f `floor` times its mean
    over all directions. whiten needs a label of two items, discriminate two labels as well.
    """
    known = unit(embeddings[labels >= 0])
    mean = known.mean(dim=0)
    _, label, counts = labels[labels >= 0].unique(return_inverse=True, return_counts=True)
    # Means of the labels [label, dim], and what is left of each item [item, dim], both around the mean of all.
    means = known.new_zeros(len(counts), known.shape[1]).index_add_(0, label, known - mean) / counts[:, None]
    within = (known - mean - means[label])[counts[label] > 1]
    whitening = None
    if len(within):
        level = within.square().mean().clamp(min=1e-12)
        whitening = function_of_covariance(within, lambda v: ((1 - SHRINKAGE) * v + SHRINKAGE * level).rsqrt())
    spread = None
    if whitening is not None and len(counts) > 1:  # scaled, for the variance of n means is their squares' sum by n - 1
        spread = means @ whitening * math.sqrt(len(counts) / (len(counts) - 1))
    found: list[Adapter | None] = []
    for kind, floor in kinds:
        matrix = torch.eye(len(mean), dtype=torch.float64) if kind == "centre" else whitening
        if kind == "discriminate":
            matrix = None if spread is None or whitening is None else whitening @ _stressing(spread, floor)
        found.append(None if matrix is None else Adapter(mean, matrix))
    return found


def _stressing(spread: Float64[Tensor, "label dim"], floor: float) -> Float64[Tensor, "dim dim"]:
    """The matrix that scales each direction by how much the labels' means differ along it."""
    least = floor * spread.square().mean()
    return function_of_covariance(spread, lambda v: ((v + least) / (1 + v + least)).sqrt())


def function_of_covariance(
    rows: Float64[Tensor, "row dim"], function: Callable[[Float64[Tensor, " _"]], Float64[Tensor, " _"]]
) -> Float64[Tensor, "dim dim"]:
    """The symmetric matrix V f(v) V', v and V the eigenvalues and vectors of rows' rows / n.

    Few rows span few directions: there a decomposition of the rows themselves is many times faster.
    """
    n, dim = rows.shape
    if 2 * n >= dim:
        values, vectors = torch.linalg.eigh(rows.T @ rows / n)
        return (vectors * function(values.clamp(min=0))) @ vectors.T
    # [direction], [direction, dim]: the directions that the rows span; along all others the eigenvalue is 0.
    lengths, directions = torch.linalg.svd(rows, full_matrices=False)[1:]
    elsewhere = function(rows.new_zeros(1))
    scaled = directions.T * (function(lengths.square() / n) - elsewhere)
    return scaled @ directions + elsewhere * torch.eye(dim, dtype=rows.dtype)


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the adapter into a model folder."""
    write_bytes(folder / ADAPTER, adapter.to_bytes())


def load_adapter(folder: Path) -> Adapter:
    """The adapter in a model folder. Raises BadInput where there is none, or none that fits."""
    if not (folder / ADAPTER).is_file():
        raise BadInput(f"{folder} has no {ADAPTER}, which its chain begins with; give the whole model folder")
    state = read_state_dict(folder / ADAPTER)
    if set(state) != {"mean", "matrix"} or state["matrix"].shape[0] != len(state["mean"]):
        raise BadInput(f"{folder / ADAPTER} is no adapter; train again")
    return Adapter(state["mean"].double(), state["matrix"].double())
