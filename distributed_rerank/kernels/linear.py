"""Gradients of linear layers for training on CPUs with AMX or AVX-512 BF16, compiled from the folder `cpu`. Layer 1.

The sum over all rows is what torch's bfloat16 product is slow at: it wants the gradient of the outputs transposed and
runs at a third of its usual speed. Here the transposing is part of how tiles are filled, and the sums stay float32.
"""

import ctypes

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from distributed_rerank.kernels.library import UNIT, load_library, pointer
from distributed_rerank.kernels.threads import divide


def gradients(
    x: BFloat16[Tensor, "row input"], of_out: BFloat16[Tensor, "row output"], has_bias: bool
) -> tuple[Float32[Tensor, "output input"], Float32[Tensor, " output"] | None]:
    """Of weight and bias: of_out' x, and the sums of the columns of `of_out`; both must be contiguous.
    Inputs and outputs are multiples of `library.UNIT`.

    Same bits for any number of threads."""
    n_rows, n_inputs, n_outputs = len(x), x.shape[1], of_out.shape[1]
    assert x.is_contiguous(), "inputs must lie row after row"
    assert of_out.is_contiguous(), "gradients must lie row after row"
    assert len(of_out) == n_rows, f"{n_rows} rows of inputs but {len(of_out)} of gradients"
    assert n_inputs % UNIT == n_outputs % UNIT == 0, f"{n_inputs} or {n_outputs} is not a multiple of {UNIT}"
    if n_rows == 0:
        return torch.zeros(n_outputs, n_inputs), torch.zeros(n_outputs) if has_bias else None
    of_weight = torch.empty(n_outputs, n_inputs)
    of_bias = torch.empty(n_outputs) if has_bias else None
    # Threads share the larger side; each has to rearrange all of the other one.
    by_output = n_outputs >= n_inputs

    def run(begin: int, end: int) -> None:
        part = (UNIT * begin, UNIT * end)
        outputs, inputs = (part, (0, n_inputs)) if by_output else ((0, n_outputs), part)
        size = load_library().linear_scratch(outputs[1] - outputs[0], inputs[1] - inputs[0])
        scratch = torch.empty(size, dtype=torch.uint8)
        bias = None if of_bias is None or (begin > 0 and not by_output) else pointer(of_bias)
        load_library().linear_gradients(
            pointer(x), pointer(of_out), ctypes.c_int64(n_rows), n_outputs, n_inputs, *outputs, *inputs,
            pointer(of_weight), bias, pointer(scratch),
        )  # fmt: skip

    divide((n_outputs if by_output else n_inputs) // UNIT, run)
    return of_weight, of_bias
