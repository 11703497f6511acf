"""How good the model is after an epoch: the set-aside labels' lists scored by it, shared among the workers.
Layer 3."""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors.sharding import rank_share
from distributed_rerank.training.epoch import Worker
from distributed_rerank.training.features import CachedPairFeatures
from distributed_rerank.training.images import DecodedImages, EncodedImages

MAX_ENCODING_BYTES = 2 * 10**9
"""Encodings held at a time; where a share needs more, it is scored in halves, and images in both are encoded twice."""


def score_lists(
    model: PairwiseModel,
    images: DecodedImages | EncodedImages | CachedPairFeatures,
    lists: CandidateLists,
    config: TrainingConfig,
    worker: Worker,
) -> Float32[Tensor, "query top_n"]:
    """Logits of the first `top_n` candidates of every query, on every worker; NaN where a list is shorter.

    Each worker scores its share of the queries; one collective puts the shares together.
    """
    items = tensor_of(lists.items[:, : config.top_n])
    distances = tensor_of(lists.distances[:, : config.top_n])
    start, stop = rank_share(len(items), worker.rank, worker.world_size)
    logits = torch.zeros(items.shape, device=worker.device)
    model.eval()
    with torch.no_grad():
        queries = tensor_of(lists.query_items[start:stop])
        logits[start:stop] = score_share(
            model, images, queries, items[start:stop], distances[start:stop], config, worker.device
        )
    return torch.where(items >= 0, worker.all_reduce(logits).cpu(), torch.nan)


def score_share(
    model: PairwiseModel,
    images: DecodedImages | EncodedImages | CachedPairFeatures,
    queries: Int64[Tensor, " query"],
    candidates: Int64[Tensor, "query top_n"],
    distances: Float[Tensor, "query top_n"],
    config: TrainingConfig,
    device: str,
) -> Float32[Tensor, "query top_n"]:
    """Logits of these lists, 0 where a list is shorter; each image is read and encoded once."""
    is_there = candidates >= 0
    logits = torch.zeros(candidates.shape, device=device)
    if not is_there.any():
        return logits
    pair_queries = queries[:, None].expand_as(candidates)[is_there]
    pair_gallery, pair_distances = candidates[is_there], distances[is_there]
    if isinstance(images, CachedPairFeatures):
        logits[is_there.to(device)] = images.logits(pair_queries, pair_gallery, pair_distances)
        return logits
    used = torch.unique(torch.cat([pair_queries, pair_gallery]))
    if len(used) * model.bytes_per_image > MAX_ENCODING_BYTES and len(queries) > 1:
        middle = len(queries) // 2
        halves = (slice(middle), slice(middle, None))
        return torch.cat(
            [score_share(model, images, queries[h], candidates[h], distances[h], config, device) for h in halves]
        )
    encoded = encode_all(model, images, used, config, device)
    rows = torch.searchsorted(used, torch.stack([pair_queries, pair_gallery]))
    scored = [
        model(encoded[query].to(device), encoded[gallery].to(device), distance.to(device)).float()
        for (query, gallery), distance in zip(
            rows.split(config.score_pairs, dim=1), pair_distances.split(config.score_pairs), strict=True
        )
    ]
    logits[is_there.to(device)] = torch.cat(scored)
    return logits


def encode_all(
    model: PairwiseModel,
    images: DecodedImages | EncodedImages,
    items: Int64[Tensor, " item"],
    config: TrainingConfig,
    device: str,
) -> Tensor:
    """Encodings of the items as at inference, in their order, on the CPU."""
    if isinstance(images, EncodedImages):
        return images.plain(items)
    return torch.cat([model.encode(images.plain(block).to(device)).cpu() for block in items.split(config.encode_block)])
