"""Attention for training on CPUs with AMX or AVX-512 BF16, compiled from the folder `cpu`. Layer 1.

Queries, keys and values are read as the layer before writes them and gradients are written as it takes them, so nothing
is copied; the weights [token, token] never leave the caches. The backward pass computes them again from the logarithms
of their sums (FlashAttention-2, Dao 2023, arXiv 2307.08691). Products are those of bfloat16 numbers, sums are float32.
The images of a call are divided among torch's number of threads; an image's result has the same bits for any number.
"""

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from distributed_rerank.kernels.library import load_library, pointer
from distributed_rerank.kernels.threads import divide

Projected = BFloat16[Tensor, "image token 3 head head_dim"]
"""Queries, keys and values."""
Output = BFloat16[Tensor, "image token head head_dim"]
Logs = Float32[Tensor, "image head token"]
"""Base 2 logarithm of the sum of exp(score) of each query."""


def attend(projected: Projected) -> tuple[Output, Logs]:
    """softmax(q k' / sqrt(head_dim)) v, and what `gradients` needs; `projected` must be contiguous, head_dim a multiple
    of `library.UNIT`."""
    n_images, n_tokens, _, n_heads, head_dim = projected.shape
    assert projected.is_contiguous(), "projected tokens must lie one after the other"
    out = torch.empty(n_images, n_tokens, n_heads, head_dim, dtype=torch.bfloat16)
    logs = torch.empty(n_images, n_heads, n_tokens)

    def run(begin: int, end: int) -> None:
        scratch = _scratch(n_tokens, head_dim)
        load_library().attend(
            pointer(projected[begin:end]), end - begin, n_tokens, n_heads, head_dim,
            pointer(out[begin:end]), pointer(logs[begin:end]), pointer(scratch),
        )  # fmt: skip

    divide(n_images, run)
    return out, logs


def gradients(projected: Projected, out: Output, logs: Logs, of_out: Output) -> Projected:
    """The gradient of `projected` from that of the output; all must be contiguous."""
    n_images, n_tokens, _, n_heads, head_dim = projected.shape
    tensors = (projected, out, logs, of_out)
    assert all(tensor.is_contiguous() for tensor in tensors), "tensors must have their numbers one after the other"
    of_projected = torch.empty_like(projected)

    def run(begin: int, end: int) -> None:
        scratch = _scratch(n_tokens, head_dim)
        load_library().attention_gradients(
            *(pointer(tensor[begin:end]) for tensor in (projected, out, of_out, logs)),
            end - begin, n_tokens, n_heads, head_dim,
            pointer(of_projected[begin:end]), pointer(scratch),
        )  # fmt: skip

    divide(n_images, run)
    return of_projected


def _scratch(n_tokens: int, head_dim: int) -> Tensor:
    return torch.empty(load_library().attention_scratch(n_tokens, head_dim), dtype=torch.uint8)
