"""ConcatSiamese of OML (STIR, arXiv 2304.13393): the backbone sees the two images one above the other.

Its state dict has OML's names and shapes for a DINO vision transformer, so checkpoints go both ways unchanged.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.rows import in_whole_tiles
from distributed_rerank.models.stacked import hidden_dims_for, load_siamese_weights, logit_of_mean_probability, mlp_head


class ConcatSiamese(PairwiseModel):
    """backbone(query above gallery image) -> MLP -> logit. The encoding of an image is its pixels."""

    config: ConcatSiameseConfig
    encoding_dtype = torch.uint8

    def __init__(self, config: ConcatSiameseConfig) -> None:
        backbone = replace(config.extractor, weights="none") if config.pairwise_weights else config.extractor
        extractor = build_extractor(backbone, stacked=2)
        hidden_dims = hidden_dims_for(config)
        super().__init__(replace(config, extractor=extractor.config, hidden_dims=hidden_dims), extractor)
        self.encoding_shape = (3, *self.transform.size)
        self.head = mlp_head(extractor.dim, hidden_dims, config.dropout, config.head_seed)
        if config.pairwise_weights:
            load_siamese_weights(self, config.pairwise_weights)
        self.eval()

    def encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> UInt8[Tensor, "image 3 height width"]:
        """The pixels themselves."""
        return pixels

    def forward(
        self,
        encoded_query: UInt8[Tensor, "pair 3 height width"],
        encoded_gallery: UInt8[Tensor, "pair 3 height width"],
        first_stage_distance: Float[Tensor, " pair"],
    ) -> Float32[Tensor, " pair"]:
        """OML's logit; in evaluation with `both_orders` that of the mean of both orders' probabilities."""
        logit = self._one_order(encoded_query, encoded_gallery)
        if self.training or not self.config.both_orders:
            return logit
        return logit_of_mean_probability(logit, self._one_order(encoded_gallery, encoded_query))

    def _one_order(self, above: Tensor, below: Tensor) -> Tensor:
        return in_whole_tiles(self.head, self.extractor.features(torch.cat([above, below], dim=2))).squeeze(1)
