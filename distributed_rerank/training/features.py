"""Pair features computed once, where nothing that is trained lies before them: only the head runs in a step.
Layer 3."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.training.images import EncodedImages

MAX_PAIRS = 2_000_000
"""Features of more pairs are not kept, for the sake of memory (about 250 bytes a pair)."""
PAIRS_PER_CALL = 128
"""Measured on a CPU: small enough for the cache, large enough for the calls not to count."""


@runtime_checkable
class FeatureModel(Protocol):
    """A pairwise model whose logit is head((pair features - mean) / std), the features having no parameters
    to train."""

    feature_mean: Tensor
    feature_std: Tensor
    head: Any

    def pair_features(self, encoded_query: Tensor, encoded_gallery: Tensor, first_stage_distance: Tensor) -> Tensor:
        """The numbers that describe a pair."""
        ...


class CachedPairFeatures:
    """Features of the pairs of candidate lists, by pair; other pairs are computed when they are asked for."""

    is_encoded = True

    def __init__(self, model: FeatureModel, images: EncodedImages, parts: list[CandidateLists]) -> None:
        self.model, self.images = model, images
        queries = torch.cat([tensor_of(p.query_items).repeat_interleave(p.items.shape[1]) for p in parts])
        gallery = torch.cat([tensor_of(p.items).flatten() for p in parts])
        distances = torch.cat([tensor_of(p.distances).flatten() for p in parts])
        is_pair = gallery >= 0
        keys, order = (queries * images.n_items + gallery)[is_pair].sort()
        self.keys = keys
        self.features = self.compute(queries[is_pair][order], gallery[is_pair][order], distances[is_pair][order])

    def fetch(self, items: Tensor, epoch: int, step: int) -> Tensor:
        """Nothing: no image is needed."""
        return torch.empty(0)

    def logits(
        self,
        queries: Int64[Tensor, " pair"],
        gallery: Int64[Tensor, " pair"],
        distances: Float[Tensor, " pair"],
    ) -> Float[Tensor, " pair"]:
        """Logits of these pairs by the head as it is now."""
        wanted = queries * self.images.n_items + gallery
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        features = self.features[place]
        is_new = self.keys[place] != wanted
        if is_new.any():
            features[is_new] = self.compute(queries[is_new], gallery[is_new], distances[is_new])
        features = features.to(self.model.feature_mean.device)
        return self.model.head((features - self.model.feature_mean) / self.model.feature_std)

    def compute(self, queries: Tensor, gallery: Tensor, distances: Tensor) -> Tensor:
        """Features of these pairs, a few at a time."""
        device = self.model.feature_mean.device
        pairs = zip(*(column.split(PAIRS_PER_CALL) for column in (queries, gallery, distances)), strict=True)
        with torch.no_grad():
            parts = [
                self.model.pair_features(
                    self.images.plain(query).to(device),
                    self.images.plain(item).to(device),
                    distance.to(device),
                ).cpu()
                for query, item, distance in pairs
            ]
        return torch.cat(parts)
