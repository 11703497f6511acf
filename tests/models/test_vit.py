"""What the forward pass of vision transformers does otherwise on a GPU, compared with the plain way on this CPU."""

import pytest
import torch
from torch import nn

from distributed_rerank.models.vit import project_patches


@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
@pytest.mark.parametrize("kernel", [(16, 16), (8, 4)])
def test_patches_by_one_product_are_those_of_the_convolution(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 24, kernel, stride=kernel)
    pixels = torch.randn(2, 3, *size)
    expected = conv(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(project_patches(conv, pixels), expected)
