"""Encodings computed once for a frozen backbone, by all workers together; projections fitted in closed form.

A `FittedModel` has projections that are fitted to frozen features of the train images. A head trained on images whose
labels the projections have seen would trust them too much. So the labels are halved, each half is encoded by
projections fitted to the other half, and the head is trained on such encodings only. The final projections are fitted
to all labels.

Encodings lie in block files of a fixed size. The workers share the blocks, so each image is encoded by one of them, and
a training that goes on after a kill finds the finished blocks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, save_model
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.runtime.progress import progress
from distributed_rerank.storage.artifacts import set_aside
from distributed_rerank.storage.files import is_intact
from distributed_rerank.storage.manifests import check_folder, write_manifest
from distributed_rerank.tensors import sharding
from distributed_rerank.training.images import DecodedImages, EncodedImages, block_path
from distributed_rerank.training.state import write_state
from distributed_rerank.training.task import TrainingWorker

FULL_ENCODER = "encoder-all"
"""Folder of the model whose projections are fitted to both halves."""


@runtime_checkable
class FittedModel(Protocol):
    """A pairwise model whose encoder is frozen features and projections of them, fitted in closed form."""

    def local_features(self, pixels: Tensor) -> Tensor:
        """The frozen part of `encode`: [image, feature]."""
        ...

    def fit_encoder(self, features: Tensor, labels: Tensor) -> None:
        """Sets the projections from features and labels of images."""
        ...

    def encode_features(self, features: Tensor) -> Tensor:
        """The rest of `encode`."""
        ...

    def fit_head(self, encoded_query: Tensor, encoded_gallery: Tensor, first_stage_distance: Tensor) -> None:
        """Sets what the head normalises its inputs with, from pairs like those it will be trained on."""
        ...


def encode_images(
    images: DecodedImages,
    labels: Int64[np.ndarray, " item"],
    half: Int64[np.ndarray, " item"] | None,
    model_folder: Path,
    folder: Path,
    worker: TrainingWorker,
) -> tuple[EncodedImages, Path]:
    """All encodings under `folder`, and the folder of the model that training starts from.

    `half` tells the half of each item for a `FittedModel`. That model then has projections fitted to both halves, while
    each item's encoding comes from the projections of the other half.
    """
    if half is None:
        # As at inference: encodings that are trained on are then rounded like those that are scored later.
        model = load_model(model_folder).prepare_for_inference(worker.device)
        encoded = encode_blocks(
            images, folder / "encodings", worker, lambda items, view: model.encode(images.view(items, view))
        )
        return encoded, model_folder
    features = compute_features(images, model_folder, folder, worker)
    if worker.rank == 0:
        for name, is_used in (("encoder-0", half == 0), ("encoder-1", half == 1), (FULL_ENCODER, half >= 0)):
            used = np.flatnonzero(is_used & (labels >= 0))
            fit_encoder(features, labels, used, model_folder, folder / name, images.config)
    worker.barrier()
    encoders = [load_fitted(folder / f"encoder-{number}") for number in (0, 1)]

    def encode(items: Tensor, view: int) -> Tensor:
        # An image of half 0 is encoded by the projections fitted to half 1, and the other way round.
        by_second = tensor_of(half)[items] == 0
        own = features.view(items, view)
        first, second = (encoder.encode_features(own) for encoder in encoders)
        return torch.where(by_second.view(-1, *[1] * (first.ndim - 1)), second, first)

    return encode_blocks(images, folder / "encodings", worker, encode), folder / FULL_ENCODER


def fit_start(
    images: DecodedImages,
    labels: Int64[np.ndarray, " item"],
    trained: Int64[np.ndarray, " trained"],
    model_folder: Path,
    folder: Path,
    worker: TrainingWorker,
) -> Path:
    """The folder of the model that training of a backbone starts from: its projections fit the untrained backbone.

    Only labels of the items `trained` are used.
    """
    features = compute_features(images, model_folder, folder, worker)
    if worker.rank == 0:
        fit_encoder(features, labels, trained, model_folder, folder / "encoder-start", images.config)
    worker.barrier()
    return folder / "encoder-start"


def compute_features(images: DecodedImages, model_folder: Path, folder: Path, worker: TrainingWorker) -> EncodedImages:
    """The frozen features of all images, in `folder`/features."""
    model = load_model(model_folder).prepare_for_inference(worker.device)
    assert isinstance(model, FittedModel), "only fitted models have projections to fit"
    return encode_blocks(
        images, folder / "features", worker, lambda items, view: model.local_features(images.view(items, view))
    )


def encode_blocks(
    images: DecodedImages, folder: Path, worker: TrainingWorker, encode: Callable[[Tensor, int], Tensor]
) -> EncodedImages:
    """All blocks of all views in `folder`: each worker computes its share of the missing ones, then all wait."""
    config = images.config
    blocks = sharding.blocks(len(images.catalogue), config.encode_block)
    wanted = [(view, number) for view in range(config.views) for number in range(len(blocks))]
    own = wanted[worker.rank :: worker.world_size]
    for view, number in progress(own, total=len(own), title=folder.name):
        path = block_path(folder, view, number)
        if not is_intact(path):
            if path.exists():
                set_aside(path, "it is not what was written")
            with torch.no_grad():
                encoded = encode(torch.arange(*blocks[number]), view)
            write_state(encoded.cpu(), path)
    worker.barrier()
    return EncodedImages(folder, len(images.catalogue), config)


def fit_encoder(
    features: EncodedImages,
    labels: Int64[np.ndarray, " item"],
    used: Int64[np.ndarray, " used"],
    model_folder: Path,
    out: Path,
    config: TrainingConfig,
) -> None:
    """Writes the model with projections fitted to `config.fit_images` of the items `used`, unless it is there."""
    if holds_model(out):
        return
    generator = np.random.default_rng([config.seed, 0xF17])
    items = tensor_of(np.sort(generator.permutation(used)[: config.fit_images]))
    model = load_model(model_folder)
    assert isinstance(model, FittedModel), "only fitted models have projections to fit"
    model.fit_encoder(features.plain(items), tensor_of(labels)[items])
    keep_model(model, out)


def keep_model(model: PairwiseModel, folder: Path) -> None:
    """Save a model that an unfinished training goes on with, and the digests of its files."""
    save_model(model, folder)
    write_manifest(folder, {"fingerprint": {}})


def holds_model(folder: Path) -> bool:
    """Whether `keep_model` has finished there; a folder that has changed since is set aside."""
    if not folder.exists():
        return False
    try:
        check_folder(folder)
    except BadInput as error:
        set_aside(folder, str(error))
        return False
    return True


def load_fitted(folder: Path) -> FittedModel:
    """The model in `folder`, on the CPU."""
    model = load_model(folder)
    assert isinstance(model, FittedModel), "only fitted models have projections to fit"
    return model
