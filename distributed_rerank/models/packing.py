"""Let oneDNN compute a network at inference on a CPU: linear layers packed, convolutions as they are.

torch computes a float32 linear layer with MKL, which does not use all of AMD's vector units, and for a bfloat16 one it
brings the weights into oneDNN's order again in every call. Packed, both run in oneDNN with the weights in order, and
GELU is part of the product. Measured on Zen 4: float32 1.35 times the rate, bfloat16 1.08 times.

For a convolution torch chooses between oneDNN and MKL by the number of images, and the two sum up in another order.
Always in oneDNN, an image has the same bits alone as among others, on a CPU without AVX-512 too. Packed weights would
fit one number of images: with another, oneDNN orders them anew in every call, and one image takes 4 times as long.
"""

import platform
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers import Conv2dSame, pad_same
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import Tensor, nn

_ROWS = 1024
"""The order of the weights is chosen for this number of input rows; others work as well."""


class PackedLinear(nn.Module):
    """An nn.Linear for inference, optionally with the GELU after it, computing in the format of its weights.

    It holds no parameters: it cannot be trained, saved or moved.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, with_gelu: bool = False, keeps_weight: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self.weight = weight if keeps_weight else None
        self.bias = None if linear.bias is None else linear.bias.detach()
        self._after = ("gelu", [], "none") if with_gelu else ("none", [], "")

    def forward(self, x: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows output"]:
        """x @ weight.T + bias, then GELU if packed with it."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._weight, self.bias, *self._after)


class OneDnnConvolution(nn.Module):
    """A float32 nn.Conv2d or timm's Conv2dSame for inference. It cannot be trained or moved."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._is_same = isinstance(convolution, Conv2dSame)
        self.kernel_size = cast(tuple[int, int], convolution.kernel_size)
        self.stride = cast(tuple[int, int], convolution.stride)
        self.dilation = cast(tuple[int, int], convolution.dilation)
        padding = [0, 0] if self._is_same else list(cast(tuple[int, int], convolution.padding))
        self._how = padding, list(self.stride), list(self.dilation), convolution.groups
        self.weight, self.bias = convolution.weight, convolution.bias  # a network of the user's may read them

    def forward(self, x: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image map row column"]:
        """The same as the convolution, channels last."""
        if self._is_same:  # as much as the size of the maps asks for
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self._how, "none", [], "")


def can_pack() -> bool:
    """Whether this machine's torch has oneDNN's linear layers for x86."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def packs(block: Any) -> bool:
    """Whether `pack_linears` packs, or has packed, all linear layers of this timm transformer block."""
    attention, mlp = block.attn, block.mlp
    layers = [attention.qkv, attention.proj, mlp.fc1, mlp.fc2] if type(mlp) is Mlp else [None]
    return type(attention) is Attention and all(type(layer) in (nn.Linear, PackedLinear) for layer in layers)


def pack_linears(network: nn.Module, read: tuple[nn.Module, ...] = ()) -> int:
    """Pack the linear layers of timm's attention and MLP modules, in place. Returns the number packed.

    Subclasses are left alone, since they may do more with their layers than call them. The layers in `read` keep a
    readable `weight`. The network must be on the CPU and in evaluation mode.
    """
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for module in network.modules():
        if type(module) is Mlp and type(module.fc1) is nn.Linear and type(module.fc2) is nn.Linear:
            with_gelu = type(module.act) is nn.GELU and module.act.approximate == "none"
            found += [(module, "fc1", PackedLinear(module.fc1, with_gelu)), (module, "fc2", PackedLinear(module.fc2))]
            found += [(module, "act", nn.Identity())] if with_gelu else []
        elif type(module) is Attention and type(module.qkv) is nn.Linear:
            keeps_weight = any(module.qkv is other for other in read)
            found += [(module, "qkv", PackedLinear(module.qkv, keeps_weight=keeps_weight))]
            found += [(module, "proj", PackedLinear(module.proj))]
    for module, name, packed in found:
        setattr(module, name, packed)
    return sum(isinstance(packed, PackedLinear) for _, _, packed in found)


def use_onednn(network: nn.Module) -> int:
    """Let oneDNN compute the float32 convolutions, in place. Returns how many.

    Subclasses but timm's Conv2dSame, and those that pad with anything but a given number of zeros, are left alone. The
    network must be on the CPU and in evaluation mode.
    """
    found = [
        (module, name, OneDnnConvolution(child))
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Conv2d)
        and type(child) in (nn.Conv2d, Conv2dSame)
        and child.padding_mode == "zeros"
        and not isinstance(child.padding, str)
        and child.weight.dtype == torch.float32
    ]
    for module, name, convolution in found:
        setattr(module, name, convolution)
    return len(found)
