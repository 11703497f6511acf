"""Choose the number format of a model's computation from the capabilities of its device.

The choice reads capability flags and never a clock, so that two workers of one kind always choose the same format and
results do not depend on how busy a machine is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distributed_rerank.config.extractor import Precision
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.hardware import bf16_support


def resolve_precision(precision: Precision, device: torch.device, *, has_narrow_maps: bool = False) -> torch.dtype:
    """float32 or bfloat16 for `precision` on `device`; "auto" is bfloat16 where the hardware multiplies it natively.

    `has_narrow_maps` says that a convolution of the network gives a map of one column and several rows. For such maps
    torch's (2.15) bfloat16 convolution for AMX reads memory that was never written, and sometimes gives NaN: "auto" is
    float32 for such a network on such a CPU. Raises BadInput for bf16 where it would fail like this, and where `device`
    would only emulate it, which is up to 80 times slower than fp32.
    """
    if precision == "fp32" or device.type == "meta":
        return torch.float32
    support = bf16_support(device)
    if support == "AMX" and has_narrow_maps:
        if precision == "bf16":
            raise BadInput(
                "precision=bf16 cannot be used here: at this image size a map of the network is one column wide, and "
                "torch's bf16 convolutions for AMX are wrong there; use auto or fp32, or a larger --image-size"
            )
        return torch.float32
    if support is not None:
        return torch.bfloat16
    if precision == "bf16":
        raise BadInput(
            f"precision=bf16 is only emulated here ({device.type}; native needs AMX, AVX-512 BF16 or CUDA "
            "capability 8.0), which can be 80 times slower; use auto or fp32"
        )
    return torch.float32


@contextmanager
def computing_in(dtype: torch.dtype, module: nn.Module, device: torch.device) -> Iterator[torch.dtype]:
    """Run the body in `dtype`; yields the dtype for its inputs.

    A module that was cast to `dtype` (inference) runs unchanged; one with float32 parameters (training) under autocast.
    """
    parameter_dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if parameter_dtype == torch.float32 and dtype != torch.float32:
        with torch.autocast(device.type, dtype=dtype):
            yield torch.float32
    else:
        yield parameter_dtype
