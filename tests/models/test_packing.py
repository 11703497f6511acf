"""Packing is a change of speed, not of output: every kind of transformer against itself before."""

import copy
import dataclasses

import pytest
import timm
import torch

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.models import packing, vit
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.tensors.hardware import bf16_support

pytestmark = pytest.mark.skipif(not packing.can_pack(), reason="torch has no oneDNN for x86 here")
CPU = torch.device("cpu")
NEEDS_BF16 = pytest.mark.skipif(bf16_support(CPU) is None, reason="no bf16 on this CPU")
PROBE = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
VIT = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 64}


@pytest.mark.parametrize(
    ("name", "args", "packed"),
    [
        ("vit_tiny_patch16_224", VIT, 4 * 3),
        ("vit_tiny_patch16_224", VIT | {"qkv_bias": False, "init_values": 1e-1}, 4 * 3),
        ("vit_small_patch16_224", VIT | {"act_layer": "gelu_tanh"}, 4 * 3),
        # Their attention is of another class; only the MLPs are packed.
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}, 2 * 4),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "conv_mlp": False}, 2 * 4),
        ("resnet10t", {}, 0),
    ],
)
def test_packed_network_gives_the_same_output(name, args, packed):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **args).eval().requires_grad_(False)
    expected = network(PROBE)
    assert packing.pack_linears(network) == packed
    torch.testing.assert_close(network(PROBE), expected, rtol=1e-4, atol=1e-5)
    assert packing.pack_linears(network) == 0, "a packed layer was packed again"


def test_gelu_by_tanh_is_not_replaced_by_the_exact_one():
    layer = timm.layers.Mlp(8, 16, act_layer=lambda: torch.nn.GELU(approximate="tanh")).eval().requires_grad_(False)
    x = 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(layer)
    exact.act = torch.nn.GELU()
    expected = layer(x)
    packing.pack_linears(layer)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    assert (exact(x) - expected).abs().max() > 1e-5, "the two could not be told apart"


@NEEDS_BF16
def test_bf16_network_keeps_its_residual_stream_in_float32():
    """Half of the error of a network that rounds every sum to bf16."""
    config = ExtractorConfig(name="vit_small_patch16_224", weights="none", image_size=64, precision="bf16")
    exact = ConcatSiamese(ConcatSiameseConfig(extractor=config)).extractor.model
    cast, rounded = copy.deepcopy(exact), copy.deepcopy(exact).to(torch.bfloat16)
    vit.cast(cast, CPU, torch.bfloat16)
    packing.pack_linears(cast, read=vit.read_weights(cast))
    images = torch.randn(16, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = vit.class_token_embedding(exact, images, pad_keys=False)
        error, before = (
            (vit.class_token_embedding(network, images.bfloat16(), pad_keys=False).float() - expected).square().mean()
            for network in (cast, rounded)
        )
    assert cast.cls_token.dtype == torch.bfloat16
    assert error < before / 2, f"mean squared errors {error:.2e} and {before:.2e}"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=NEEDS_BF16)])
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"fc_norm": True},  # the norm is then on the class token
        {"final_norm": False},
        {"pre_norm": True},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"scale_attn_norm": True},
        {"scale_mlp_norm": True},
        {"reg_tokens": 2},
    ],
    ids=str,
)
def test_every_plain_transformer_can_be_prepared(args, precision):
    config = ExtractorConfig(name="vit_tiny_patch16_224", weights="none", image_size=64, args=VIT | args)
    pixels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = build_extractor(dataclasses.replace(config, precision="fp32"))
    assert extractor.is_plain_vit
    prepared = build_extractor(dataclasses.replace(config, precision=precision)).prepare_for_inference("cpu")
    with torch.inference_mode():
        tolerance = 1e-5 if precision == "fp32" else 1e-2
        torch.testing.assert_close(prepared(pixels), extractor(pixels), rtol=0, atol=tolerance)


@NEEDS_BF16
def test_padded_keys_change_nothing_in_bf16():
    """The path of CPUs with AMX, whatever this one has."""
    config = ExtractorConfig(name="vit_small_patch16_224", weights="none", image_size=64, precision="bf16")
    extractor = ConcatSiamese(ConcatSiameseConfig(extractor=config)).extractor.prepare_for_inference("cpu")
    images = torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for block in extractor.model.blocks:
        block.attn.fused_attn = True
    with torch.inference_mode():
        plain, padded = (vit.class_token_embedding(extractor.model, images, pad_keys=pad) for pad in (False, True))
    torch.testing.assert_close(padded.float(), plain.float(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {}),
        ("mobilenetv2_100", {"pad_type": "same"}),  # timm's Conv2dSame
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_image_has_the_same_bits_alone_as_among_others(name, args, threads):
    """Where torch chooses by the number of images, they differ on a CPU without AVX-512."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **args).eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(33, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    n_convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    assert packing.use_onednn(network) == n_convolutions > 5
    assert packing.use_onednn(network) == 0, "a packed layer was packed again"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = network(images)
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
        for n in (1, 2, 3, 8, 16, 32):
            assert torch.equal(network(images[:n]), together[:n]), n
    finally:
        torch.set_num_threads(before)


def test_convolutions_that_pad_otherwise_or_are_narrow_stay():
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding="same"),
        torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        torch.nn.Conv2d(4, 4, 1, dtype=torch.bfloat16),
    )
    assert packing.use_onednn(layers.eval().requires_grad_(False)) == 0
