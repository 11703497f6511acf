"""A transformer's block in bfloat16 training on a CPU against float64, and against torch's own operations."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from distributed_rerank.kernels import library
from distributed_rerank.kernels.hardware import bf16_support
from distributed_rerank.models import bf16_training, vit

pytestmark = pytest.mark.skipif(bf16_support(torch.device("cpu")) is None, reason="this CPU multiplies no bf16")

NETWORKS = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
    "no bias of queries": {"qkv_bias": False},
    "width of 48": {"embed_dim": 48},
    "dropout of paths": {"drop_path_rate": 0.3},
}


def network(args: dict) -> nn.Module:
    args = {"embed_dim": 64, "num_heads": 2, **args}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=0, **args)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs all outputs."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=images.dtype == torch.float32):
        out = vit.class_token_embedding(model, images, pad_keys=False)
    (out.double() * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["kernels", "torch"])
def by_kernels(request, monkeypatch):
    if request.param == "kernels" and library.why_unavailable() is not None:
        pytest.skip(str(library.why_unavailable()))
    if request.param == "torch":
        monkeypatch.setattr(bf16_training, "_has_kernels", lambda *widths: False)
    return request.param == "kernels"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("args", [pytest.param(args, id=name) for name, args in NETWORKS.items()])
def test_gradients_of_all_weights_are_those_of_float64(args, checkpointing, by_kernels):
    model = network(args)
    images = torch.randn(3, 3, 64, 48)
    exact = gradients(copy.deepcopy(model).double(), images.double())
    model.set_grad_checkpointing(checkpointing)
    found = gradients(model, images)
    assert found.keys() == exact.keys()
    whole = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    for name, gradient in exact.items():
        # A bias of keys has a gradient of zero but for rounding.
        assert (found[name] - gradient).norm() < 0.05 * max(gradient.norm(), 0.02 * whole), name


def test_gradient_of_a_frozen_layer_is_not_computed(by_kernels):
    model = network({})
    for parameter in model.blocks[1].mlp.fc1.parameters():
        parameter.requires_grad_(False)
    model.blocks[2].attn.qkv.bias.requires_grad_(False)
    exact = gradients(copy.deepcopy(model).double(), (images := torch.randn(2, 3, 64, 64)).double())
    found = gradients(model, images)
    assert found.keys() == exact.keys()
    assert not {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias", "blocks.2.attn.qkv.bias"} & found.keys()
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "blocks.1.norm2.weight"):
        assert (found[name] - exact[name]).norm() < 0.05 * exact[name].norm()


def test_kernels_are_as_exact_as_torch(monkeypatch):
    if library.why_unavailable() is not None:
        pytest.skip(str(library.why_unavailable()))
    model, images = network({}), torch.randn(8, 3, 64, 64)
    exact = gradients(copy.deepcopy(model).double(), images.double())
    by_kernels = gradients(copy.deepcopy(model), images)
    monkeypatch.setattr(bf16_training, "_has_kernels", lambda *widths: False)
    by_torch = gradients(model, images)
    assert any(not torch.equal(by_kernels[name], by_torch[name]) for name in exact), "the kernels were not used"

    def error(found: dict[str, Tensor]) -> float:
        return float(
            torch.stack([(found[n] - exact[n]).norm() / exact[n].norm() for n in exact if "qkv.bias" not in n]).mean()
        )

    assert error(by_kernels) < 1.2 * error(by_torch)
