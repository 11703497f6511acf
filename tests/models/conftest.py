"""Tiny backbones and pictures that every test of the models uses."""

import pytest
import torch
from torch import Tensor

from distributed_rerank.config.extractor import ExtractorConfig


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
