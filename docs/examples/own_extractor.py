"""An extractor of your own: any torch module from normalised images to one vector each.

Put its folder on PYTHONPATH: distributed-rerank embed --extractor own_extractor:colours --image-size 32 ...
With a model of transformers, open_clip or sentence-transformers, return its image tower from `forward` in the same way.
"""

import torch


class Colours(torch.nn.Module):
    """Mean colours of a grid of cells, then a learned matrix."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d(grid)
        self.matrix = torch.nn.Linear(3 * grid**2, dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.matrix(self.pool(images).flatten(1))


def colours(grid: int = 4, dim: int = 24) -> Colours:
    """--extractor-args grid=8 changes the grid."""
    return Colours(grid, dim)
