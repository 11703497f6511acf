"""TokenSiamese: two images compared by cached local tokens and global vectors of a frozen backbone.

Feature maps of one or several depths of any timm backbone are pooled to a grid. Its cells (tokens), poolings to coarser
grids (global vectors) and the extractor's embedding are projected in closed form (`whitening`), scaled to norm 1 and
cached. A pair is described by the first-stage distance, the cosines of the global vectors and, for each depth, the
matrix of token similarities: the sorted best matches of its rows and columns, their mean, and the mean of its diagonal.
The logit is a learned positive multiple of the distance plus a small MLP on these numbers, whose last layer starts at
zero, so that training starts at the first stage's order. It does not depend on which image is the query.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float16, Float32, Int64, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models import vit
from distributed_rerank.models.extractor import Extractor, build_extractor
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.precision import computing_in
from distributed_rerank.models.rows import in_whole_tiles
from distributed_rerank.models.whitening import Projection

STORAGE = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
INT8_STEPS = 127


class TokenSiamese(PairwiseModel):
    """Pair features -> MLP, plus a multiple of the first-stage distance; `fit_encoder`, then `fit_head`, then train."""

    config: TokenSiameseConfig
    uses_distance = True
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: TokenSiameseConfig) -> None:
        extractor = build_extractor(config.extractor)
        super().__init__(replace(config, extractor=extractor.config), extractor)
        self.channels = _channels(extractor, config.depths)
        self.n_globals = len(self.channels) * len(config.pools) + 1
        n_tokens, n_depths = config.grid**2, len(self.channels)
        self.n_token_numbers = n_depths * n_tokens * config.token_dim
        self.encoding_shape = (self.n_token_numbers + self.n_globals * config.global_dim,)
        self.encoding_dtype = STORAGE[config.token_storage]
        n_features = 1 + self.n_globals + n_depths * (n_tokens + 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.head_seed)
            self.token_projections = nn.ModuleList(Projection(c, config.token_dim) for c in self.channels)
            sizes = [c * pool**2 for c in self.channels for pool in config.pools] + [extractor.dim]
            self.global_projections = nn.ModuleList(Projection(size, config.global_dim) for size in sizes)
            self.head = PairHead(n_features, config.hidden_dim, config.head_dropout)
        self.register_buffer("feature_mean", torch.zeros(n_features))
        self.register_buffer("feature_std", torch.ones(n_features))
        self.eval()

    def local_features(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float16[Tensor, "image feature"]:
        """The frozen features, one row per image: the pooled maps of the depths, then the embedding of norm 1."""
        return self._pooled(*_maps(self.extractor, pixels, self.config.depths))

    def _pooled(self, maps: list[Tensor], embedding: Tensor) -> Float16[Tensor, "image feature"]:
        pooled = [functional.adaptive_avg_pool2d(token_map, self.config.grid).flatten(1) for token_map in maps]
        return torch.cat([*pooled, functional.normalize(embedding, dim=1)], dim=1).half()

    def fit_encoder(self, features: Float[Tensor, "image feature"], labels: Int64[Tensor, " image"]) -> None:
        """Fit all projections to `local_features` of labelled images, in closed form and deterministically.

        Raises BadInput if no label has two images.
        """
        # Each token is a row of its own with its image's label: x [image, token, channel] -> [image * token, channel].
        tokens, vectors = self._split_features(features)
        for project, x in zip(self.token_projections, tokens, strict=True):
            assert isinstance(project, Projection), "projections are fitted"
            project.fit(x.flatten(0, 1), labels.repeat_interleave(x.shape[1]), self.config.shrinkage)
        for project, x in zip(self.global_projections, vectors, strict=True):
            assert isinstance(project, Projection), "projections are fitted"
            project.fit(x, labels, self.config.shrinkage)

    def encode_features(self, features: Float[Tensor, "image feature"]) -> Num[Tensor, "image number"]:
        """The encoding of `local_features`: tokens, depth after depth, then global vectors, each of norm 1."""
        tokens, vectors = self._split_features(features)
        parts = [project(x).flatten(1) for project, x in zip(self.token_projections, tokens, strict=True)]
        parts += [project(x) for project, x in zip(self.global_projections, vectors, strict=True)]
        encoded = torch.cat(parts, dim=1)
        if self.encoding_dtype == torch.int8:
            return (encoded * INT8_STEPS).round().to(torch.int8)
        return encoded.to(self.encoding_dtype)

    def encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Num[Tensor, "image number"]:
        """encode_features(local_features(pixels)); int8 counts in steps of 1/127."""
        return self.encode_features(self.local_features(pixels))

    def encode_and_embed(
        self, pixels: UInt8[Tensor, "image 3 height width"]
    ) -> tuple[Num[Tensor, "image number"], Float32[Tensor, "image dim"]]:
        """Both from one pass of the backbone."""
        maps, embedding = _maps(self.extractor, pixels, self.config.depths)
        encoded = self.encode_features(self._pooled(maps, embedding))
        return encoded, functional.normalize(embedding, dim=1) if self.extractor.config.normalise else embedding

    def token_vectors(self, encoded: Num[Tensor, "image number"]) -> Float32[Tensor, "image depth token dim"]:
        """The tokens of encodings, each of norm 1 up to the rounding of `encoding_dtype`."""
        return self._split_encoding(encoded)[0]

    def pair_features(
        self,
        encoded_query: Num[Tensor, "pair number"],
        encoded_gallery: Num[Tensor, "pair number"],
        first_stage_distance: Float[Tensor, " pair"],
    ) -> Float32[Tensor, "pair feature"]:
        """The numbers that describe a pair, first the first-stage distance; the same for both orders."""
        (query_tokens, query_vectors), (gallery_tokens, gallery_vectors) = (
            self._split_encoding(encoded) for encoded in (encoded_query, encoded_gallery)
        )
        # [pair, vector]
        cosines = (query_vectors * gallery_vectors).sum(dim=-1)
        # [pair, depth, token, token] -> [pair, depth, token]: each token's best match in the other image, sorted, the
        # mean of both directions; and [pair, depth]: the mean similarity of tokens at the same place.
        similarity = _similarities(query_tokens, gallery_tokens)
        best = (similarity.amax(dim=-1).sort(dim=-1).values + similarity.amax(dim=-2).sort(dim=-1).values) / 2
        diagonal = similarity.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        distance = first_stage_distance.float()[:, None]
        return torch.cat([distance, cosines, best.flatten(1), best.mean(dim=-1), diagonal], dim=1)

    def best_match(
        self, encoded_query: Num[Tensor, "pair number"], encoded_gallery: Num[Tensor, "pair number"]
    ) -> Float32[Tensor, " pair"]:
        """Similarity of a token to its best match in the other image, averaged over tokens, images and depths."""
        (query, _), (gallery, _) = (self._split_encoding(encoded) for encoded in (encoded_query, encoded_gallery))
        similarity = _similarities(query, gallery)
        return (similarity.amax(dim=-1).mean(dim=(1, 2)) + similarity.amax(dim=-2).mean(dim=(1, 2))) / 2

    def fit_head(self, encoded_query: Tensor, encoded_gallery: Tensor, first_stage_distance: Tensor) -> None:
        """Set the mean and deviation for scaling pair features, from pairs like those of the training."""
        with torch.no_grad():
            features = self.pair_features(encoded_query, encoded_gallery, first_stage_distance).double()
        self.feature_mean.copy_(features.mean(dim=0))
        self.feature_std.copy_(features.std(dim=0, correction=0) + 1e-6)

    def forward(
        self,
        encoded_query: Num[Tensor, "pair number"],
        encoded_gallery: Num[Tensor, "pair number"],
        first_stage_distance: Float[Tensor, " pair"],
    ) -> Float32[Tensor, " pair"]:
        """Positive multiple of the scaled first-stage distance + MLP(scaled pair features)."""
        features = self.pair_features(encoded_query, encoded_gallery, first_stage_distance)
        return in_whole_tiles(self.head, (features - self.feature_mean) / self.feature_std)

    def _split_features(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens [image, token, channel] of each depth, and the inputs [image, channel] of the global projections."""
        grid = self.config.grid
        *maps, embedding = features.float().split([*(c * grid**2 for c in self.channels), self.extractor.dim], dim=1)
        maps = [x.unflatten(1, (c, grid, grid)) for x, c in zip(maps, self.channels, strict=True)]
        pooled = [functional.adaptive_avg_pool2d(x, pool).flatten(1) for x in maps for pool in self.config.pools]
        return [x.flatten(2).transpose(1, 2) for x in maps], [*pooled, embedding]

    def _split_encoding(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [pair, depth, token, dim] and global vectors [pair, vector, dim] as float32."""
        # Each part is cut out first: as float32 it is then dense, and no later step copies it again.
        tokens, vectors = (
            part.float() / INT8_STEPS if part.dtype == torch.int8 else part.float()
            for part in (encoded[:, : self.n_token_numbers], encoded[:, self.n_token_numbers :])
        )
        shape = (len(self.channels), self.config.grid**2, -1)
        return tokens.unflatten(1, shape), vectors.unflatten(1, (self.n_globals, -1))


def _similarities(
    query_tokens: Float32[Tensor, "pair depth token dim"], gallery_tokens: Float32[Tensor, "pair depth token dim"]
) -> Float32[Tensor, "pair depth token token"]:
    """Products of all tokens of a pair; contiguous factors, so that their rounding does not depend on other pairs."""
    return query_tokens.contiguous() @ gallery_tokens.contiguous().transpose(-1, -2)


class PairHead(nn.Module):
    """exp(w) * distance + linear(features) + MLP(features), the last two zero at the start."""

    def __init__(self, n_features: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.log_distance_weight = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(n_features, 1, bias=False)
        last = nn.Linear(hidden_dim, 1, bias=False)
        self.mlp = nn.Sequential(nn.Linear(n_features, hidden_dim), nn.GELU(), nn.Dropout(dropout), last)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(last.weight)

    def forward(self, features: Float32[Tensor, "pair feature"]) -> Float32[Tensor, " pair"]:
        """One logit per row; column 0 is the scaled first-stage distance."""
        change = (self.linear(features) + self.mlp(features)).squeeze(1)
        return self.log_distance_weight.exp() * features[:, 0] + change


def _maps(extractor: Extractor, pixels: Tensor, depths: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Feature maps at the depths [image, channel, row, column], and the embedding before normalising, in float32."""
    network = extractor.model
    with computing_in(extractor.dtype_on(pixels.device), network, pixels.device) as dtype:
        images = extractor.normalise_pixels(pixels).to(dtype)
        if extractor.is_plain_vit:
            maps, embedding = vit.maps_and_embedding(network, images, depths)
        else:
            images = images.contiguous(memory_format=torch.channels_last)
            last, maps = network.forward_intermediates(images, indices=list(depths), output_fmt="NCHW")
            embedding = network.forward_head(last)
    return [token_map.float() for token_map in maps], embedding.float()


def _channels(extractor: Extractor, depths: Sequence[int]) -> list[int]:
    """Channels of the maps at `depths`, from one black image; BadInput if the backbone has no such depths."""
    pixels = torch.zeros(1, 3, *extractor.transform.size, dtype=torch.uint8)
    try:
        with torch.no_grad():
            return [token_map.shape[1] for token_map in _maps(extractor, pixels, depths)[0]]
    except (AttributeError, IndexError, AssertionError, ValueError, TypeError) as error:
        raise BadInput(
            f"extractor {extractor.config.name} has no feature maps at depths {tuple(depths)} ({error}); "
            "give stages of a CNN or blocks of a ViT, such as -1"
        ) from error
