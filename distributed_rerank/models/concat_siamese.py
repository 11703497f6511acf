"""ConcatSiamese of OML (STIR, arXiv 2304.13393): the backbone sees the two images one above the other.

Its state dict has OML's names and shapes for a DINO vision transformer, so checkpoints go both ways unchanged.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.models.rows import in_whole_tiles
from distributed_rerank.models.stacked import StackedSiamese


class ConcatSiamese(StackedSiamese):
    """backbone(query above gallery image) -> MLP -> logit. The encoding of an image is its pixels."""

    config: ConcatSiameseConfig
    encoding_dtype = torch.uint8

    def __init__(self, config: ConcatSiameseConfig) -> None:
        super().__init__(config)
        self.encoding_shape = (3, *self.transform.size)

    def encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> UInt8[Tensor, "image 3 height width"]:
        """The pixels themselves."""
        return pixels

    def _one_order(self, above: Tensor, below: Tensor) -> Tensor:
        return in_whole_tiles(self.head, self.extractor.features(torch.cat([above, below], dim=2))).squeeze(1)
