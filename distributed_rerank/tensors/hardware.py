"""Number formats that the hardware multiplies natively."""

import functools

import torch


@functools.cache
def bf16_support(device: torch.device) -> str | None:
    """Name of the unit of `device` that multiplies bf16 natively; None where bf16 would be emulated.

    CUDA from compute capability 8, CPUs with AMX or AVX-512 BF16.
    """
    if device.type == "cuda":
        return "tensor cores" if torch.cuda.get_device_capability(device) >= (8, 0) else None
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        flags = torch.cpu.get_capabilities()
        if flags.get("amx_bf16"):
            return "AMX"
        if flags.get("avx512_bf16"):
            return "AVX-512 BF16"
    return None
