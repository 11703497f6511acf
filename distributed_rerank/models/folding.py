"""Fold batch normalisation into the convolution before it: at inference both are one linear map.

The tensors of one probe image, not names, show which convolution feeds which normalisation. If the folded network gives
another output for that image, the fold is undone.
"""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-5
"""Largest difference of the output that counts as rounding, relative to the output's largest value."""


def fold_batch_norms(network: nn.Module, probe: Float[Tensor, "image 3 height width"]) -> int:
    """Fold each batch normalisation that directly follows a convolution, in place. Returns the number folded.

    `network` is in evaluation mode and float32. An activation within the normalisation stays. Returns 0 and changes
    nothing if the output for `probe` would differ by more than rounding: a convolution's output has other uses then.
    """
    found = _pairs(network, probe)
    if not found:
        return 0
    before = network(probe)
    kept = [(convolution, convolution.weight, convolution.bias) for convolution, _, _ in found]
    for convolution, norm, name in found:
        _fold(convolution, norm)
        _replace(network, name, _rest_of(norm))
    error = (network(probe) - before).abs().max() / before.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    if float(error) <= TOLERANCE:
        return len(found)
    for convolution, weight, bias in kept:
        convolution.weight, convolution.bias = weight, bias
    for _, norm, name in found:
        _replace(network, name, norm)
    return 0


def _pairs(network: nn.Module, probe: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, str]]:
    """Convolutions, the normalisations of their output, and the names of the normalisations; each is used once."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, str]] = []
    uses: Counter[nn.Module] = Counter()

    def note_output(module: Any, _: Any, output: Tensor) -> None:
        uses[module] += 1
        made[id(output)] = (module, output)  # keeps the tensor alive, or another could get its id

    def note_input(module: Any, inputs: tuple[Tensor, ...]) -> None:
        uses[module] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module, names[module]))

    names = {module: name for name, module in network.named_modules()}
    hooks = []
    for module in names:
        if type(module) in (nn.Conv2d, Conv2dSame):
            hooks.append(module.register_forward_hook(note_output))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(note_input))
    if not any(isinstance(module, nn.BatchNorm2d) for module in names):
        return []
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    taken = Counter(convolution for convolution, _, _ in pairs)
    return [pair for pair in pairs if uses[pair[0]] == uses[pair[1]] == taken[pair[0]] == 1]


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None, "statistics are tracked"
    assert norm.running_var is not None, "statistics are tracked"
    bias = None if convolution.bias is None else convolution.bias.double()
    scale, shift = (None if value is None else value.double() for value in (norm.weight, norm.bias))
    weight, bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        bias,
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        scale,
        shift,
    )
    convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
    convolution.bias = nn.Parameter(bias.float(), requires_grad=False)


def _rest_of(norm: nn.BatchNorm2d) -> nn.Module:
    """The activation of a normalisation, if it has one; its dropout does nothing at inference."""
    rest: Any = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
    return rest


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
