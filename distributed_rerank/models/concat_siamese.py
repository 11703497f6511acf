"""ConcatSiamese of OML (STIR, arXiv 2304.13393): the backbone sees the two images one above the other.

Its state dict has OML's names and shapes for a DINO vision transformer, so checkpoints go both ways unchanged.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.pairwise import PairwiseModel


class ConcatSiamese(PairwiseModel):
    """backbone(query above gallery image) -> MLP -> logit. The encoding of an image is its pixels."""

    config: ConcatSiameseConfig
    encoding_dtype = torch.uint8

    def __init__(self, config: ConcatSiameseConfig) -> None:
        backbone = replace(config.extractor, weights="none") if config.pairwise_weights else config.extractor
        extractor = build_extractor(backbone, stacked=2)
        super().__init__(replace(config, extractor=extractor.config), extractor)
        self.encoding_shape = (3, *self.transform.size)
        self.head = mlp_head(extractor.dim, config.hidden_dims, config.dropout, config.head_seed)
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
        return self.head(self.extractor.features(torch.cat([above, below], dim=2))).squeeze(1)


def logit_of_mean_probability(a: Float32[Tensor, " pair"], b: Float32[Tensor, " pair"]) -> Float32[Tensor, " pair"]:
    """logit((sigmoid(a) + sigmoid(b)) / 2), computed so that pairs with probabilities near 0 or 1 stay in order."""
    return torch.logaddexp(functional.logsigmoid(a), functional.logsigmoid(b)) - torch.logaddexp(
        functional.logsigmoid(-a), functional.logsigmoid(-b)
    )


def mlp_head(dim: int, hidden_dims: Sequence[int], dropout: float, seed: int) -> nn.Sequential:
    """OML's head: Linear, Sigmoid, Dropout for each hidden dimension, then a Linear to one number without bias."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for hidden in hidden_dims:
            layers += [nn.Linear(dim, hidden), nn.Sigmoid(), nn.Dropout(dropout)]
            dim = hidden
        return nn.Sequential(*layers, nn.Linear(dim, 1, bias=False))


def load_siamese_weights(model: PairwiseModel, path: str) -> None:
    """Load a ConcatSiamese state dict: OML's, Lightning's with a prefix, or ours.

    Raises BadInput if the file cannot be read, holds no `extractor.` entries, or has other names or shapes.
    """
    state = weights.read_state_dict(path)
    first = next((name for name in state if "extractor." in name), None)
    if first is None:
        raise BadInput(f"weights {path} hold no 'extractor.' entries; give a state dict of OML's or our ConcatSiamese")
    prefix = first[: first.index("extractor.")]
    weights.load_exactly(model, {name.removeprefix(prefix): value for name, value in state.items()}, path)
