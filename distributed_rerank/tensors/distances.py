"""L2 distances in two forms: exact ones for every result, and fast ones that only choose candidates.

`exact_distances` is the definition: float32 inputs, differences and sum in float64, one rounding to float32 at the end.
Each pair is computed alone, so its bits do not depend on other pairs. `relative_squared_tile` is one matrix product;
its rounding errors depend on the shape of the tile, and `relative_squared_error` bounds them. The product of
`rounded_queries` and `rounded_gallery` is the same in bfloat16, with `rounded_error` as its bound.
"""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int64
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
NORM_PARTS = 3
"""Number of bfloat16 values, of 8 bits each, whose sum holds the 24 bits of a float32."""
SMALLEST_NORMAL = 2.0**-126


def exact_distances(left: Float[Tensor, "pair dim"], right: Float[Tensor, "pair dim"]) -> Float[Tensor, " pair"]:
    """L2 distance (not squared) of row i to row i, by differences summed in float64, returned as float32.

    Equal rows are at distance exactly 0. The relative error before the last rounding is below (dim + 3) * 2^-53, so the
    result is the correctly rounded distance but for ties within that margin.
    """
    difference = left.double() - right.double()
    return difference.square_().sum(dim=1).sqrt_().float()


def exact_pair_distances(
    query_embeddings: Float[Tensor, "query dim"],
    gallery_embeddings: Float[Tensor, "gallery dim"],
    rows: Int64[Tensor, " pair"],
    columns: Int64[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """`exact_distances` of the pairs (query `rows[i]`, gallery `columns[i]`), in memory independent of their number."""
    # A few hundred rows of float64 stay in a core's cache; a GPU wants fewer, larger steps.
    step = 512 if query_embeddings.device.type == "cpu" else 65_536
    out = torch.empty(len(rows), dtype=torch.float32, device=query_embeddings.device)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        left = query_embeddings.index_select(0, rows[part])
        out[part] = exact_distances(left, gallery_embeddings.index_select(0, columns[part]))
    return out


def squared_norms(embeddings: Float[Tensor, "item dim"]) -> Float[Tensor, " item"]:
    """Squared L2 norm of each row in float64; NaN or inf where a row holds a value that is not finite."""
    out = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for start in range(0, len(embeddings), 4096):
        part = slice(start, start + 4096)
        out[part] = embeddings[part].double().square_().sum(dim=1)
    return out


def relative_squared_tile(
    query_embeddings: Float[Tensor, "query dim"],
    gallery_embeddings: Float[Tensor, "gallery dim"],
    gallery_squared_norms: Float[Tensor, " gallery"],
    out: Float[Tensor, "query gallery"],
) -> None:
    """Write |g|^2 - 2 q.g into `out`, by one float32 matrix product.

    That is the squared distance less |q|^2, which is the same for a whole row, so rows are ordered as by distance.
    """
    assert torch.get_float32_matmul_precision() == "highest", "the error bound holds for full float32 products only"
    out.copy_(gallery_squared_norms)
    out.addmm_(query_embeddings, gallery_embeddings.t(), alpha=-2)


def relative_squared_error(
    query_squared_norms: Float[Tensor, " query"], largest_gallery_norm: float, dim: int
) -> Float[Tensor, " query"]:
    """Largest error of an entry of `relative_squared_tile`, per query, in float64.

    The error of a float32 inner product of length n in any order of summation is at most gamma_n |q| |g| with gamma_n =
    n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); |g|^2 is one
    more term. Two terms are added for its rounding, the whole is doubled as a margin, and products that underflow are
    counted in full. For unit vectors of 384 dimensions that is 1.4e-4.
    """
    n_terms = dim + 3
    gamma = n_terms * UNIT_ROUNDOFF / (1 - n_terms * UNIT_ROUNDOFF)
    magnitude = 2 * query_squared_norms.sqrt() * largest_gallery_norm + largest_gallery_norm**2
    return 2 * gamma * magnitude + 4 * n_terms * SMALLEST_NORMAL


@dataclass(frozen=True)
class Rounded:
    """Embeddings in bfloat16, with extra columns that add the squared norm of the gallery item to the product."""

    factors: BFloat16[Tensor, "row width"]
    residuals: Float64[Tensor, " item"]
    """L2 norm of each embedding's rounding error."""


def rounded_queries(embeddings: Float32[Tensor, "item dim"]) -> Rounded:
    """The left factor [query, width]: -2 q, then a one for each part of the squared norm, then zeros."""
    rounded, dim = _rounded(embeddings, len(embeddings)), embeddings.shape[1]
    # Doubling is exact: -2 q has the rounding error of q, doubled.
    rounded.factors[:, :dim] *= -2
    rounded.factors[:, dim : dim + NORM_PARTS] = 1
    return rounded


def rounded_gallery(
    embeddings: Float32[Tensor, "item dim"], gallery_squared_norms: Float32[Tensor, " item"], n_rows: int
) -> Rounded:
    """The right factor [n_rows, width]: g, then |g|^2 in three parts, then zeros; rows without embedding are at inf."""
    rounded, dim = _rounded(embeddings, n_rows), embeddings.shape[1]
    # Each part is the rest that the parts before it left of the norm, rounded to bfloat16.
    rest = gallery_squared_norms
    for column in range(dim, dim + NORM_PARTS):
        rounded.factors[: len(rest), column] = part = rest.bfloat16()
        rest = rest - part
    rounded.factors[len(rest) :, dim] = torch.inf
    return rounded


def _rounded(embeddings: Float32[Tensor, "item dim"], n_rows: int) -> Rounded:
    """The embeddings in bfloat16, with rows of zeros up to `n_rows` and columns of zeros up to a multiple of 16."""
    dim = embeddings.shape[1]
    width = -(-(dim + NORM_PARTS) // 16) * 16
    factors = torch.zeros(n_rows, width, dtype=torch.bfloat16, device=embeddings.device)
    residuals = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for start in range(0, len(embeddings), 1024):  # these rows stay in a core's cache
        part = slice(start, min(start + 1024, len(embeddings)))
        factors[part, :dim] = embeddings[part]
        # The difference is exact in float32: both have the same exponent or neighbouring ones.
        lost = embeddings[part] - factors[part, :dim]
        residuals[part] = lost.double().square_().sum(dim=1).sqrt_()
    return Rounded(factors, residuals)


def rounded_error(
    query_squared_norms: Float64[Tensor, " query"], largest_gallery_norm: float, dim: int,
    query_residuals: Float64[Tensor, " query"], largest_gallery_residual: float,
) -> Float64[Tensor, " query"]:  # fmt: skip
    """Largest error of an entry of the product of `Rounded` factors, as |g|^2 - 2 q.g, before the entry is rounded.

    By Cauchy and Schwarz |q.g - q'.g'| <= |q - q'| |g| + |q'| |g - g'|, with the actual norms of the differences: about
    2^-10.4 of |q|, where the worst rounding is 2^-9. The sum of the products in float32 adds the error of
    `relative_squared_error`, whose margin covers the columns of the norm, and factors or products that are flushed to
    zero add theirs.
    """
    norms = query_squared_norms.sqrt()
    rounding = query_residuals * largest_gallery_norm + (norms + query_residuals) * largest_gallery_residual
    flushed = 8 * (dim + NORM_PARTS) * SMALLEST_NORMAL * (1 + norms + largest_gallery_norm)
    summed = relative_squared_error(query_squared_norms, largest_gallery_norm, dim + NORM_PARTS)
    return 2 * (1 + 2.0**-20) * rounding + 2 * summed + flushed
