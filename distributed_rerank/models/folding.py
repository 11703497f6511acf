"""Batch normalisation folded into the convolution before it: at inference both are one linear map. Layer 2.

Which convolution feeds which normalisation is seen from the tensors of one probe image, not guessed from names, and
the folded network must give the same output for that image, else it is left as it was.
"""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-5
"""Largest difference of the output that is rounding, relative to the output's largest value."""


def fold_batch_norms(network: nn.Module, probe: Float[Tensor, "image 3 height width"]) -> int:
    """Fold every batch normalisation of `network` (in evaluation mode, float32) that follows a convolution directly.

    In place; the number folded. An activation within the normalisation stays. 0, and the network as it was, where the
    output for `probe` would differ by more than rounding: then a convolution's output is used elsewhere too.
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
    """Convolutions and the normalisations that take their output, with the names of these; each used once."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, str]] = []
    uses: Counter[nn.Module] = Counter()

    def note_output(module: Any, _: Any, output: Tensor) -> None:
        uses[module] += 1
        made[id(output)] = (module, output)  # the tensor too, or its id would be given to another

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
    """What a normalisation does beside normalising; dropout does nothing at inference."""
    rest: Any = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
    return rest


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
