"""SplitSiamese(k): a ConcatSiamese whose first k blocks run once per image and are cached.

The parameters and their names are ConcatSiamese's; k = 0 is ConcatSiamese up to rounding, k > 0 an approximation to
start fine-tuning from. An image may be the query (above) or the gallery image (below), and a ConcatSiamese gives its
patches other positions in either place. One encoding serves both: the first k blocks run with the positions of a single
image, as in the backbone's pre-training. Positions are added to the tokens, and the residual connections carry them
along, so at the join they are exchanged for those of the upper or lower half, which needs neither a second encoding nor
parameters. The class tokens of both images are averaged at the join (they are equal at k = 0).
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from distributed_rerank.config.pairwise import SplitSiameseConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models import vit
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.precision import computing_in
from distributed_rerank.models.rows import in_whole_tiles
from distributed_rerank.models.stacked import hidden_dims_for, load_siamese_weights, logit_of_mean_probability, mlp_head

STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class SplitSiamese(PairwiseModel):
    """blocks < split_at per image; the tokens of both through the others; class token -> MLP -> logit."""

    config: SplitSiameseConfig

    def __init__(self, config: SplitSiameseConfig) -> None:
        backbone = replace(config.extractor, weights="none") if config.pairwise_weights else config.extractor
        extractor = build_extractor(backbone, stacked=2)
        hidden_dims = hidden_dims_for(config)
        super().__init__(replace(config, extractor=extractor.config, hidden_dims=hidden_dims), extractor)
        _check_splittable(extractor.model, extractor.is_plain_vit, extractor.config.network, config.split_at)
        self.encoding_dtype = STORAGE[config.storage]
        self.grid = vit.patch_grid(extractor.model, *self.transform.size)
        n_tokens = self.grid[0] * self.grid[1] + extractor.model.num_prefix_tokens
        self.encoding_shape = (n_tokens, extractor.dim)
        self.head = mlp_head(extractor.dim, hidden_dims, config.dropout, config.head_seed)
        if config.pairwise_weights:
            load_siamese_weights(self, config.pairwise_weights)
        self.eval()

    def encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float[Tensor, "image token dim"]:
        """The image's tokens after the first `split_at` blocks, prefix tokens first, with single-image positions."""
        network = self.extractor.model
        with computing_in(self.extractor.dtype_on(pixels.device), network, pixels.device) as dtype:
            tokens = vit.first_blocks(network, self.extractor.normalise_pixels(pixels).to(dtype), self.config.split_at)
        return tokens.to(self.encoding_dtype)

    def forward(
        self,
        encoded_query: Float[Tensor, "pair token dim"],
        encoded_gallery: Float[Tensor, "pair token dim"],
        first_stage_distance: Float[Tensor, " pair"],
    ) -> Float32[Tensor, " pair"]:
        """ConcatSiamese's logit from the cached tokens, with its `both_orders`."""
        logit = self._one_order(encoded_query, encoded_gallery)
        if self.training or not self.config.both_orders:
            return logit
        return logit_of_mean_probability(logit, self._one_order(encoded_gallery, encoded_query))

    def _one_order(self, above: Tensor, below: Tensor) -> Tensor:
        network, device, n_prefix = self.extractor.model, above.device, self.extractor.model.num_prefix_tokens
        to_above, to_below = self._position_exchange()
        with computing_in(self.extractor.dtype_on(device), network, device) as dtype:
            # [pair, prefix + 2 x patch, dim]: the mean prefix tokens, then the patches of both images with the
            # positions of their halves.
            above, below = above.to(dtype), below.to(dtype)
            prefix = (above[:, :n_prefix] + below[:, :n_prefix]) / 2
            patches = [above[:, n_prefix:] + to_above.to(dtype), below[:, n_prefix:] + to_below.to(dtype)]
            pad_keys = self.extractor.pads_keys(device)
            features = vit.forward_from_block(
                network, torch.cat([prefix, *patches], dim=1), self.config.split_at, pad_keys
            )
        return in_whole_tiles(self.head, features.float()).squeeze(1)

    def _position_exchange(self) -> tuple[Tensor, Tensor]:
        """Differences [1, patch, dim] from single-image positions to those of the upper and of the lower half."""
        network = self.extractor.model
        single = vit.positions_at(network, self.grid)
        both = vit.positions_at(network, (2 * self.grid[0], self.grid[1]))
        above, below = both.split(single.shape[1], dim=1)
        return above - single, below - single


def _check_splittable(network: nn.Module, is_plain_vit: bool, name: str, split_at: int) -> None:
    if not is_plain_vit or not isinstance(getattr(network, "norm_pre", None), nn.Identity):
        raise BadInput(f"SplitSiamese needs a plain timm vision transformer with a class token; {name} is none")
    depth = len(list(network.get_submodule("blocks").children()))
    if not 0 <= split_at < depth:
        raise BadInput(f"split_at={split_at} must be from 0 to {depth - 1} for {name}, which has {depth} blocks")
