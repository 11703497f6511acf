"""Closed-form projections of frozen features: principal components, then whitening within labels.

Whitening by the covariance within labels (WCCN, Hatch et al. 2006; the metric of linear discriminant analysis) shrinks
the directions in which images of one label differ, so that cosines of projected features show differences of label.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.errors import BadInput
from distributed_rerank.models.rows import in_whole_tiles

EXACT_CHANNELS = 1024
"""Up to this many channels the covariance is decomposed exactly, above it by a seeded randomised method."""

OVERSAMPLING = 10
"""Additional directions that the randomised method computes, to make the wanted ones accurate."""


class Projection(nn.Module):
    """normalize((features - mean) @ matrix) with constants set by `fit`, random before it."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, n_channels: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_channels))
        self.register_buffer("matrix", torch.randn(n_channels, dim) / n_channels**0.5)

    def forward(self, features: Float[Tensor, "*rows channel"]) -> Float32[Tensor, "*rows dim"]:
        """Projected rows of norm 1 (or 0)."""
        projected = in_whole_tiles(lambda rows: rows @ self.matrix, features.float() - self.mean)
        return functional.normalize(projected, dim=-1)

    def fit(
        self, features: Float[Tensor, "row channel"], labels: Int64[Tensor, " row"], shrinkage: float
    ) -> "Projection":
        """Set the constants by `within_label_whitening`. Returns itself."""
        mean, matrix = within_label_whitening(features, labels, self.matrix.shape[1], shrinkage)
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)
        return self


def principal_directions(centred: Float32[Tensor, "row channel"], dim: int) -> Float32[Tensor, "channel dim"]:
    """The `dim` directions of largest variance, largest first; fewer if rows - 1 or channels are fewer.

    Deterministic: the randomised method for many channels has a fixed seed and restores the global random state.
    """
    most = min(centred.shape[1], centred.shape[0] - 1)
    dim = min(dim, most)
    if centred.shape[1] <= EXACT_CHANNELS:
        double = centred.double()
        _, vectors = torch.linalg.eigh(double.T @ double)
        return vectors[:, -dim:].flip(1).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.pca_lowrank(centred, q=min(dim + OVERSAMPLING, most), center=False, niter=3)[2][:, :dim]


def within_label_whitening(
    features: Float[Tensor, "row channel"], labels: Int64[Tensor, " row"], dim: int, shrinkage: float
) -> tuple[Float32[Tensor, " channel"], Float32[Tensor, "channel dim"]]:
    """Mean and matrix of a projection to `dim` numbers; projected rows of one label scatter equally in all directions.

    With V the principal directions and S the covariance around the labels' means along them, the matrix is V Q
    diag^-1/2, where Q, diag decompose S + shrinkage * mean variance * identity. Labels of one row do not enter S. Where
    the data allow fewer directions than `dim`, the last columns are 0. Raises BadInput for fewer than two rows and
    where no two rows share a label, so that S is unknown.
    """
    _, label, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(label) < 2 or int(counts.max()) < 2:
        raise BadInput(
            f"projections cannot be fitted to {len(label)} features of {len(counts)} labels; "
            "give labels with two images or more"
        )
    # z [row, direction]: the features along the principal directions [channel, direction].
    mean = features.float().mean(dim=0)
    directions = principal_directions(features.float() - mean, dim)
    z = ((features.float() - mean) @ directions).double()
    # The covariance [direction, direction] around label means [label, direction], over rows with company.
    label_means = z.new_zeros(len(counts), z.shape[1]).index_add_(0, label, z) / counts[:, None]
    within = (z - label_means[label])[counts[label] > 1]
    scatter = within.T @ within / len(within)
    # Shrunk towards a multiple of the identity, then inverted as a square root.
    level = shrinkage * scatter.diagonal().mean() + torch.finfo(torch.float32).tiny
    values, vectors = torch.linalg.eigh(scatter + level * torch.eye(len(scatter), dtype=scatter.dtype))
    matrix = directions.double() @ (vectors * values.clamp(min=float(level)).rsqrt())
    return mean, functional.pad(matrix, (0, dim - matrix.shape[1])).float()
