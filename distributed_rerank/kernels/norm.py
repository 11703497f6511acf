"""Layer norms for training on CPUs with AVX-512 BF16, compiled from the folder `cpu`. Layer 1.

From float32 rows to bfloat16 ones and back, without a copy in between."""

import ctypes

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from distributed_rerank.kernels.library import load_library, pointer
from distributed_rerank.kernels.threads import divide

CHUNK = 256
"""Rows whose gradients of scale and shift are summed one after the other, then added to those of other chunks: so their
bits do not depend on the number of threads."""


def norm(
    x: Float32[Tensor, "*row dim"], scale: Float32[Tensor, " dim"], shift: Float32[Tensor, " dim"], eps: float
) -> tuple[BFloat16[Tensor, "*row dim"], Float32[Tensor, "row 2"]]:
    """(x - mean) / sqrt(variance + eps) scale + shift, and mean and 1 / sqrt(variance + eps) of each row. dim
    is a multiple of `library.UNIT`."""
    assert x.is_contiguous(), "rows must lie one after the other"
    dim, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    out, statistics = torch.empty_like(x, dtype=torch.bfloat16), torch.empty(n_rows, 2)
    rows, out_rows = x.view(-1, dim), out.view(-1, dim)

    def run(begin: int, end: int) -> None:
        part = slice(begin * CHUNK, end * CHUNK)
        load_library().norm_rows(
            pointer(rows[part]), ctypes.c_int64(len(rows[part])), dim, pointer(scale), pointer(shift),
            ctypes.c_float(eps), pointer(out_rows[part]), pointer(statistics[part]),
        )  # fmt: skip

    divide(-(-n_rows // CHUNK), run)
    return out, statistics


def gradients(
    x: Float32[Tensor, "*row dim"],
    statistics: Float32[Tensor, "row 2"],
    scale: Float32[Tensor, " dim"],
    of_out: BFloat16[Tensor, "*row dim"],
) -> tuple[Float32[Tensor, "*row dim"], Float32[Tensor, " dim"], Float32[Tensor, " dim"]]:
    """Of x, scale and shift."""
    assert x.is_contiguous(), "rows must lie one after the other"
    assert of_out.is_contiguous(), "gradients must lie row after row"
    dim, n_chunks = x.shape[-1], -(-len(statistics) // CHUNK)
    of_x = torch.empty_like(x)
    of_scale, of_shift = torch.zeros(n_chunks, dim), torch.zeros(n_chunks, dim)
    rows, of_rows, of_out_rows = x.view(-1, dim), of_x.view(-1, dim), of_out.view(-1, dim)

    def run(begin: int, end: int) -> None:
        part = slice(begin * CHUNK, end * CHUNK)
        load_library().norm_rows_gradients(
            pointer(rows[part]), pointer(of_out_rows[part]), pointer(statistics[part]),
            ctypes.c_int64(len(rows[part])), dim, pointer(scale), CHUNK, pointer(of_rows[part]),
            pointer(of_scale[begin:]), pointer(of_shift[begin:]),
        )  # fmt: skip

    divide(n_chunks, run)
    return of_x, of_scale.sum(dim=0), of_shift.sum(dim=0)
