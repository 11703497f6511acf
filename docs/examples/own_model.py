"""A pairwise model of your own: the product of two embeddings, seen by a small network.

Put its folder on PYTHONPATH and train it: distributed-rerank train --pairwise-model own_model:ProductSiamese ...
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from distributed_rerank.config.pairwise import PairwiseConfig
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.pairwise import PairwiseModel


@dataclass(frozen=True, kw_only=True)
class ProductConfig(PairwiseConfig):
    """Every field is an option of the command line."""

    model_name: ClassVar[str] = "own_model:ProductSiamese"
    width: int = 32
    """Width of the hidden layer."""


class ProductSiamese(PairwiseModel):
    config: ProductConfig
    encoding_dtype = torch.float32

    def __init__(self, config: ProductConfig) -> None:
        extractor = build_extractor(config.extractor)
        super().__init__(replace(config, extractor=extractor.config), extractor)
        self.encoding_shape = (extractor.dim,)
        layers = (torch.nn.Linear(extractor.dim, config.width), torch.nn.GELU(), torch.nn.Linear(config.width, 1))
        self.head = torch.nn.Sequential(*layers)
        self.eval()

    def encode(self, pixels):
        return self.extractor(pixels)

    def forward(self, encoded_query, encoded_gallery, first_stage_distance):
        return first_stage_distance + self.head(encoded_query * encoded_gallery).squeeze(1)
