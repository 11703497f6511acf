"""Mining again while training goes on: the current model orders every anchor's candidates anew. Layer 3.

The first mining knows only the first stage's distances. What that confuses and the model by now tells apart teaches
nothing more; what the model itself confuses does. The workers share the anchors, and the order found is part of the
checkpoint, so that a run that was stopped trains on the pairs of the uninterrupted one.
"""

import logging
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.training.epoch import Worker
from distributed_rerank.training.features import CachedPairFeatures
from distributed_rerank.training.images import DecodedImages, EncodedImages
from distributed_rerank.training.validation import score_lists

logger = logging.getLogger(__name__)


def is_due(epoch: int, config: TrainingConfig) -> bool:
    """Whether candidates are ordered anew before this epoch (counted from 0)."""
    return config.remine_every > 0 and epoch > 0 and epoch % config.remine_every == 0


def mine_again(
    model: PairwiseModel,
    images: DecodedImages | EncodedImages | CachedPairFeatures,
    anchors: CandidateLists,
    config: TrainingConfig,
    worker: Worker,
) -> Int64[Tensor, "anchor kept"]:
    """Places in each anchor's list of its nearest `top_n` candidates by the model, nearest first; -1 = fewer.

    All candidates of the list are scored. Equal logits keep the first stage's order. The same on every worker.
    """
    logits = score_lists(model, images, anchors, replace(config, top_n=config.n_items), worker)
    nearest = torch.where(logits.isnan(), torch.inf, logits).argsort(dim=1, stable=True)[:, : config.top_n]
    order = torch.where(logits.gather(1, nearest).isnan(), -1, nearest)
    if worker.rank == 0:
        beyond = float((order >= config.top_n).float().mean()) if order.numel() else 0.0
        logger.info("mined again: %.1f %% of the candidates kept were not among the first top_n before", 100 * beyond)
    return order


def reorder(lists: CandidateLists, order: Int64[Tensor, "anchor kept"]) -> CandidateLists:
    """The candidates at these places, with their first-stage distances: margins keep their meaning."""
    places = order.numpy()
    is_there = places >= 0
    items, distances = (np.take_along_axis(column, places.clip(min=0), axis=1) for column in lists[1:])
    return CandidateLists(
        lists.query_items, np.where(is_there, items, -1), np.where(is_there, distances, np.float32(np.inf))
    )
