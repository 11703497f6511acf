"""Folding is a change of speed, not of output: every kind of network against itself before."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.folding import fold_batch_norms

PROBE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def with_statistics(network: nn.Module) -> nn.Module:
    """In evaluation mode, with normalisations as after training: none of them is the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight.data, 0.5, 1.5), (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0),
            ):  # fmt: skip
                assert values is not None
                values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)
    return network.eval().requires_grad_(False)


def n_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "args", "left"),
    [
        ("mobilenetv2_050", {"pad_type": "same"}, 0),
        ("resnet10t", {}, 0),
        ("regnetx_002", {}, 0),
        # Its normalisations come before the convolutions, one behind the first of each layer.
        ("densenet121", {"growth_rate": 8, "block_config": (2, 2)}, None),
        ("convnext_atto", {}, 0),
    ],
)
def test_folded_network_gives_the_same_output(name: str, args: dict, left: int | None) -> None:
    torch.manual_seed(0)
    network = with_statistics(timm.create_model(name, num_classes=0, **args))
    expected, before = network(PROBE), n_norms(network)
    folded = fold_batch_norms(network, PROBE[:1])
    assert n_norms(network) == before - folded
    assert left is None or n_norms(network) == left
    assert folded > 0 or before == 0
    difference = (network(PROBE) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


class Shared(nn.Module):
    """The convolution's output goes round the normalisation as well."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return x + self.norm(x)


class Twice(Shared):
    """The normalisation serves two convolutions' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x)) + self.norm(self.convolution(x * 2))


@pytest.mark.parametrize("kind", [Shared, Twice])
def test_network_that_cannot_be_folded_is_left_as_it_was(kind: type[nn.Module]) -> None:
    network = with_statistics(kind())
    before, expected = copy.deepcopy(network.state_dict()), network(PROBE)
    assert fold_batch_norms(network, PROBE[:1]) == 0
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(network(PROBE), expected)


def test_extractor_prepared_for_inference_is_folded_and_equal() -> None:
    config = ExtractorConfig(name="mobilenetv2_050", weights="none", image_size=64, precision="fp32")
    extractor = build_extractor(config)
    with_statistics(extractor.model)
    pixels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    expected, untouched = extractor(pixels), copy.deepcopy(extractor)
    found = extractor.prepare_for_inference("cpu")
    assert n_norms(found) == 0 < n_norms(untouched)
    assert (found(pixels) - expected).abs().max() < 1e-5
    assert torch.equal(untouched(pixels), expected)
