"""Vision transformers on the compiled kernels against the same networks by timm in float64.

Errors are in units of the standard deviation of the exact output; tolerances are some three times what was measured.
"""

import copy

import pytest
import timm
import torch
from timm.layers import LayerScale, SwiGLUPacked
from torch import Tensor, nn

from distributed_rerank.kernels import library
from distributed_rerank.kernels.hardware import bf16_support
from distributed_rerank.models import compiled_vit, vit
from distributed_rerank.models.extractor import ExtractorConfig, build_extractor

NEEDS_KERNELS = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
NEEDS_BF16 = pytest.mark.skipif(bf16_support(torch.device("cpu")) is None, reason="no bf16 on this CPU")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
SMALL = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 0}
VIT, DINO_V2 = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
NETWORKS = {
    "plain": (VIT, {}),
    "49 patches": (VIT, {"img_size": 112}),
    "heads of 64": (VIT, {"embed_dim": 192, "num_heads": 3}),
    "layer scale": (VIT, {"init_values": 0.5}),
    "registers": (VIT, {"reg_tokens": 4}),
    "no bias": (VIT, {"qkv_bias": False, "proj_bias": False}),
    "norm before the blocks": (VIT, {"pre_norm": True}),  # the convolution has no bias then
    "norm of the class token": (VIT, {"fc_norm": True}),
    "DINOv2": (DINO_V2, {"img_size": 42, "init_values": 0.5}),  # patches of 14, registers without positions
}
REFUSED = {
    "norms of queries and keys": {"qk_norm": True},
    "norm of attention": {"scale_attn_norm": True},
    "norm in the MLP": {"scale_mlp_norm": True},
    "SwiGLU": {"mlp_layer": SwiGLUPacked},
    "GELU by tanh": {"act_layer": "gelu_tanh"},
    "GELU by sigmoid": {"act_layer": "quick_gelu"},
    "RMS norms": {"norm_layer": "rmsnorm"},
    "width of 48": {"embed_dim": 48},
    "heads of 16": {"num_heads": 4},
    "208 hidden units": {"mlp_ratio": 3.25},
}


def network(name: str, args: dict) -> nn.Module:
    """Random, with every parameter far from where it has no effect; as initialised, attention would be even."""
    torch.manual_seed(0)
    built = timm.create_model(name, **(SMALL | args)).eval().requires_grad_(False)
    for module in built.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.3)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) and module.bias is not None:
            module.bias.normal_(std=0.3)
        if isinstance(module, LayerScale):
            module.gamma.mul_(1 + 0.3 * torch.randn(module.gamma.shape))
    for tokens in (built.cls_token, built.reg_token, built.pos_embed):
        if tokens is not None:
            tokens.normal_(std=0.5)
    return built


def prepared(original: nn.Module, parts: int) -> nn.Module:
    swapped = copy.deepcopy(original)
    compiled_vit.prepare(swapped, MEAN, STD, parts)
    return swapped


def pixels_for(original: nn.Module) -> Tensor:
    shape = (3, 3, *original.patch_embed.img_size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def exact(original: nn.Module, pixels: Tensor) -> tuple[nn.Module, Tensor]:
    """The network and its input in float64."""
    return copy.deepcopy(original).double(), (pixels.double() / 255 - MEAN.double()) / STD.double()


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.std()).item()


@NEEDS_KERNELS
@pytest.mark.parametrize(("parts", "tolerance"), [(1, 3e-2), (2, 3e-4), (3, 5e-6)])
@pytest.mark.parametrize(("name", "args"), NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_embedding_is_that_of_timm(name, args, parts, tolerance):
    original = network(name, args)
    assert compiled_vit.can_run(original)
    pixels = pixels_for(original)
    in_float64, images = exact(original, pixels)
    found = vit.class_token_embedding(prepared(original, parts), pixels, pad_keys=False)
    assert error(found, in_float64(images)) < tolerance


@NEEDS_KERNELS
@torch.no_grad()
def test_errors_do_not_grow_with_depth():
    """As in a network of 12 blocks whose sums are float32."""
    original = network(VIT, {"depth": 12, "embed_dim": 192, "num_heads": 3})
    pixels = pixels_for(original)
    in_float64, images = exact(original, pixels)
    expected = in_float64(images)
    for parts, tolerance in ((1, 3e-2), (2, 2e-4), (3, 5e-6)):
        found = vit.class_token_embedding(prepared(original, parts), pixels, pad_keys=False)
        assert error(found, expected) < tolerance


@NEEDS_KERNELS
@torch.no_grad()
def test_three_parts_err_no_more_than_float32():
    original = network(VIT, {"depth": 6, "embed_dim": 192, "num_heads": 3, "img_size": 112})
    pixels = pixels_for(original)
    in_float64, images = exact(original, pixels)
    expected = in_float64(images)
    deviations = [
        (vit.class_token_embedding(of, given, pad_keys=False) - expected).square().mean().sqrt()
        for of, given in ((original, images.float()), (prepared(original, 3), pixels))
    ]
    assert deviations[1] < 1.5 * deviations[0]


@NEEDS_KERNELS
@pytest.mark.parametrize(("parts", "tolerance"), [(1, 5e-2), (2, 3e-4), (3, 5e-6)])
@pytest.mark.parametrize("kind", ["plain", "49 patches", "layer scale", "registers", "DINOv2"])
@torch.no_grad()
def test_maps_of_any_block_are_those_of_timm(kind, parts, tolerance):
    original = network(*NETWORKS[kind])
    pixels = pixels_for(original)
    in_float64, images = exact(original, pixels)
    expected = in_float64.forward_intermediates(images, indices=[0, 1], norm=True, intermediates_only=True)
    swapped = prepared(original, parts)
    maps, embedding = vit.maps_and_embedding(swapped, pixels, (0, -1))
    assert error(maps[0], expected[0]) < tolerance
    assert error(maps[1], expected[1]) < tolerance
    assert torch.equal(embedding, vit.class_token_embedding(swapped, pixels, pad_keys=False))


@NEEDS_KERNELS
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "registers", "DINOv2"])
@torch.no_grad()
def test_network_split_anywhere_gives_the_bits_of_the_whole(kind, parts):
    name, args = NETWORKS[kind]
    swapped = prepared(network(name, args | {"depth": 3}), parts)
    pixels = pixels_for(swapped)
    whole = vit.class_token_embedding(swapped, pixels, pad_keys=False)
    for n_blocks in range(4):
        tokens = vit.first_blocks(swapped, pixels, n_blocks)
        assert torch.equal(vit.join(swapped, tokens, n_blocks, pad_keys=False), whole), f"split at {n_blocks}"


@NEEDS_KERNELS
@torch.no_grad()
def test_maps_are_not_overwritten_by_later_blocks():
    original = network(*NETWORKS["norm of the class token"])  # so the final norm is the identity
    pixels = pixels_for(original)
    in_float64, images = exact(original, pixels)
    expected = in_float64.forward_intermediates(images, indices=[0, 1], norm=True, intermediates_only=True)
    maps, _ = vit.maps_and_embedding(prepared(original, 2), pixels, (0, -1))
    assert error(maps[0], expected[0]) < 3e-4
    assert error(maps[1], expected[1]) < 3e-4


@pytest.mark.parametrize("args", REFUSED.values(), ids=REFUSED)
def test_other_networks_are_refused_though_they_are_plain(args):
    assert compiled_vit.can_run(timm.create_model(VIT, **SMALL))
    other = timm.create_model(VIT, **(SMALL | args))
    assert vit.is_plain_vit(other)
    assert not compiled_vit.can_run(other)


def test_networks_of_other_images_are_refused():
    assert not compiled_vit.can_run(timm.create_model(VIT, **SMALL, in_chans=1))
    assert not compiled_vit.can_run(timm.create_model(VIT, **SMALL, patch_size=(16, 8)))


@NEEDS_BF16
@pytest.mark.parametrize("args", [pytest.param(args, id=kind) for kind, args in REFUSED.items()])
@torch.inference_mode()
def test_extractor_runs_other_networks_by_torch(args):
    config = {
        "name": VIT,
        "weights": "none",
        "image_size": 32,
        "args": {"depth": 2, "embed_dim": 64, "num_heads": 2} | args,
    }
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = build_extractor(ExtractorConfig(**config, precision="bf16")).prepare_for_inference("cpu")
    assert not extractor.is_compiled
    assert not any(
        isinstance(module, compiled_vit.CompiledBlock | compiled_vit.CompiledPatches) for module in extractor.modules()
    )
    expected = build_extractor(ExtractorConfig(**config, precision="fp32"))(pixels)
    torch.testing.assert_close(extractor(pixels), expected, rtol=0, atol=1e-2)
