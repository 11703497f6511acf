"""Candidate lists scored by the model while it is trained: for the figure after an epoch, and to mine again.

The first mining knows only the first stage's distances. Pairs that the first stage confuses and the model by now tells
apart no longer teach anything; pairs that the model itself confuses do. So `mine_again` lets the current model order
every anchor's candidates. The order is part of the checkpoint, and a resumed run trains on the same pairs.
"""

import logging
from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.sharding import rank_share
from distributed_rerank.training.images import CachedPairFeatures, DecodedImages, EncodedImages, TrainingImages
from distributed_rerank.training.task import TrainingWorker

logger = logging.getLogger(__name__)

MAX_ENCODING_BYTES = 2 * 10**9
"""Encodings held at a time; a larger share is scored in halves, and images in both halves are encoded twice."""


def is_remining_due(epoch: int, config: TrainingConfig) -> bool:
    """Whether candidates are ordered anew before this epoch (counted from 0)."""
    return config.remine_every > 0 and epoch > 0 and epoch % config.remine_every == 0


def mine_again(
    model: PairwiseModel,
    images: TrainingImages,
    anchors: CandidateLists,
    config: TrainingConfig,
    worker: TrainingWorker,
) -> Int64[Tensor, "anchor kept"]:
    """Places in each anchor's list of its nearest `top_n` candidates by the model, nearest first; -1 = fewer.

    All candidates of the list are scored. Equal logits keep the first stage's order. The same on every worker.
    """
    logits = score_lists_together(model, images, anchors, replace(config, top_n=config.n_items), worker)
    nearest = torch.where(logits.isnan(), torch.inf, logits).argsort(dim=1, stable=True)[:, : config.top_n]
    order = torch.where(logits.gather(1, nearest).isnan(), -1, nearest)
    if worker.rank == 0:
        beyond = float((order >= config.top_n).float().mean()) if order.numel() else 0.0
        logger.info("mined again: %.1f %% of the candidates kept were not among the first top_n before", 100 * beyond)
    return order


def score_lists_together(
    model: PairwiseModel,
    images: TrainingImages,
    lists: CandidateLists,
    config: TrainingConfig,
    worker: TrainingWorker,
) -> Float32[Tensor, "query top_n"]:
    """Logits of the first `top_n` candidates of every query, on every worker; NaN where a list is shorter.

    Each worker scores its share of the queries; one collective puts the shares together.
    """
    items, distances = lists.items[:, : config.top_n], lists.distances[:, : config.top_n]
    start, stop = rank_share(len(items), worker.rank, worker.world_size)
    # Zero where other workers score, so that the sum of all workers' tables is the whole one.
    logits = torch.zeros(items.shape, device=worker.device)
    model.eval()
    with torch.no_grad():
        queries = lists.query_items[start:stop]
        logits[start:stop] = score_share(
            model, images, queries, items[start:stop], distances[start:stop], config, worker.device
        )
    return torch.where(items >= 0, worker.all_reduce(logits).cpu(), torch.nan)


def score_share(
    model: PairwiseModel,
    images: TrainingImages,
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
    # [pair]: the table's entries that are there, row by row.
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
    # [2, pair]: the rows of `encoded` of each pair's query and candidate.
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
