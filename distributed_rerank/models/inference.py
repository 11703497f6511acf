"""The fastest format of a network for inference, by its kind and the device.

| network | device | format |
|---|---|---|
| plain vision transformer | CPU | linear layers packed for oneDNN; in bf16 the norms stay float32 (`vit.cast`) |
| plain vision transformer | GPU | cast |
| any other | CPU | batch normalisation folded into convolutions, channels last, linear layers packed, all in oneDNN |
| any other | GPU | batch normalisation folded, channels last |
"""

from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from distributed_rerank.models import folding, packing, vit


def prepare(network: Any, probe: Float32[Tensor, "1 3 height width"], dtype: torch.dtype) -> None:
    """Bring `network` into its format for inference in `dtype`, in place, on its device.

    `probe` is an image of the network's input size; folding compares the outputs for it before and after. A prepared
    network cannot be trained, and a second call changes nothing.
    """
    device, is_plain_vit = probe.device, vit.is_plain_vit(network)
    if is_plain_vit:
        vit.keep_positions(network)
        vit.cast(network, device, dtype)
    else:
        if all(parameter.dtype == torch.float32 for parameter in network.parameters()):
            with torch.no_grad():
                folding.fold_batch_norms(network, probe)
        network.to(dtype, memory_format=torch.channels_last)
    if device.type == "cpu" and packing.can_pack():
        packing.pack_linears(network, read=vit.read_weights(network) if is_plain_vit else ())
        if not is_plain_vit:
            packing.use_onednn(network)
