"""OML's two trivial pairwise models: the L2 distance of two embeddings, with or without a learned linear map.

TrivialDistanceSiamese is `linear=False`; LinearTrivialDistanceSiamese is `linear=True`. With the identity as the map
and no bias both reproduce the distances and the order of a first stage by the same extractor.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from distributed_rerank.config.pairwise import DistanceSiameseConfig
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.rows import in_whole_tiles


class DistanceSiamese(PairwiseModel):
    """||W (query - gallery)|| + bias. The encoding of an image is its embedding."""

    config: DistanceSiameseConfig
    encoding_dtype = torch.float32

    def __init__(self, config: DistanceSiameseConfig) -> None:
        extractor = build_extractor(config.extractor)
        super().__init__(replace(config, extractor=extractor.config), extractor)
        self.encoding_shape = (extractor.dim,)
        self.proj = _square_map(extractor.dim, config) if config.linear else nn.Identity()
        self.eval()

    def encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float32[Tensor, "image dim"]:
        """The extractor's embedding."""
        return self.extractor(pixels)

    def encode_and_embed(
        self, pixels: UInt8[Tensor, "image 3 height width"]
    ) -> tuple[Float32[Tensor, "image dim"], Float32[Tensor, "image dim"]]:
        """The embedding, twice."""
        embedding = self.encode(pixels)
        return embedding, embedding

    def forward(
        self,
        encoded_query: Float32[Tensor, "pair dim"],
        encoded_gallery: Float32[Tensor, "pair dim"],
        first_stage_distance: Float[Tensor, " pair"],
    ) -> Float32[Tensor, " pair"]:
        """The distance plus the bias, in place of a logit: larger = more different."""
        query, gallery = (in_whole_tiles(self.proj, x) for x in (encoded_query, encoded_gallery))
        return (query - gallery).norm(dim=1) + self.config.output_bias


def _square_map(dim: int, config: DistanceSiameseConfig) -> nn.Linear:
    """A linear layer without bias, at first the identity or random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.head_seed)
        linear = nn.Linear(dim, dim, bias=False)
    if config.identity_init:
        nn.init.eye_(linear.weight)
    return linear
