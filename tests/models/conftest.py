"""Tiny backbones and pictures that every test of the models uses."""

import pytest
import torch
from torch import Tensor

from distributed_rerank.kernels import library
from distributed_rerank.models.extractor import ExtractorConfig


@pytest.fixture(scope="session")
def vit_config() -> ExtractorConfig:
    """A vision transformer of 3 blocks and 64 channels; positions 14 x 14, images 64 px, so that they are
    resampled."""
    return ExtractorConfig(
        name="vit_small_patch16_224",
        weights="none",
        args={"depth": 3, "embed_dim": 64, "num_heads": 2},
        image_size=64,
        resize="square",
        precision="fp32",
    )


@pytest.fixture(scope="session")
def cnn_config() -> ExtractorConfig:
    """A small residual network, which has batch normalisation."""
    return ExtractorConfig(name="resnet10t", weights="none", image_size=64, resize="square", precision="fp32")


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """Six pictures of 64 x 64 noise."""
    return torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Networks prepared for inference compute by torch, as where the compiled kernels cannot be had; the reason."""
    reason = "the kernels are switched off for this test"
    monkeypatch.setattr(library, "why_unavailable", lambda: reason)
    return reason


@pytest.fixture
def as_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks prepared for inference use the kernels as on a CPU with AMX. What the vector units compute instead is
    the same, though slower than torch's float32."""
    if library.why_unavailable() is not None:
        pytest.skip(str(library.why_unavailable()))
    monkeypatch.setattr(library, "why_without_amx", lambda: None)


@pytest.fixture(params=["torch", "kernels"])
def has_kernels(request: pytest.FixtureRequest) -> bool:
    """Runs a test by torch alone and, where they can be had, with the compiled kernels: users have either."""
    request.getfixturevalue("without_kernels" if request.param == "torch" else "as_with_amx")
    return request.param == "kernels"
