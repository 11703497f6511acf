"""Encodings computed once for a frozen backbone, by all workers together; projections fitted in closed form.
Layer 3.

A model may have projections that are fitted to frozen features of the train images (`FittedModel`). A head
trained on images whose labels the projections have seen would trust them too much. So the labels are halved,
each half is encoded by projections fitted to the other, and the head only ever sees such encodings; the final
projections know all labels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.files import atomic_path
from distributed_rerank.models.saving import load_model, save_model
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.runtime.progress import progress
from distributed_rerank.training.epoch import Worker
from distributed_rerank.training.images import DecodedImages, EncodedImages, block_path, blocks_of


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


def wait(worker: Worker) -> None:
    """Returns when all workers have come here."""
    worker.all_reduce(torch.zeros(1, device=worker.device))


def encode_images(
    images: DecodedImages,
    labels: Int64[np.ndarray, " item"],
    half: Int64[np.ndarray, " item"] | None,
    model_folder: Path,
    folder: Path,
    worker: Worker,
) -> tuple[EncodedImages, Path]:
    """All encodings under `folder`, and the folder of the model that training starts from.

    `half` tells the half of each item for a `FittedModel`: then that model has projections fitted to both,
    while the encodings are those of the other half's projections.
    """
    # As at inference: encodings that are trained on are then rounded like those that are scored later.
    model = load_model(model_folder).prepare_for_inference(worker.device)
    if half is None:
        encoded = compute(
            images, folder / "encodings", worker, lambda items, view: model.encode(images.view(items, view))
        )
        return encoded, model_folder
    assert isinstance(model, FittedModel), "only fitted models are cross-fitted"
    features = compute(
        images,
        folder / "features",
        worker,
        lambda items, view: model.local_features(images.view(items, view)),
    )
    if worker.rank == 0:
        fit_encoders(features, labels, half, model_folder, folder, images.config)
    wait(worker)
    encoders = [load_fitted(folder / f"encoder-{number}") for number in (0, 1)]

    def encode(items: Tensor, view: int) -> Tensor:
        # An image of half 0 is encoded by what was fitted to half 1.
        by_second = tensor_of(half)[items] == 0
        found = features.view(items, view)
        first, second = (encoder.encode_features(found) for encoder in encoders)
        return torch.where(by_second.view(-1, *[1] * (first.ndim - 1)), second, first)

    return compute(images, folder / "encodings", worker, encode), folder / "encoder-all"


def compute(
    images: DecodedImages, folder: Path, worker: Worker, encode: Callable[[Tensor, int], Tensor]
) -> EncodedImages:
    """All blocks of all views in `folder`: this worker computes its share of those that are not there, then
    waits."""
    config = images.config
    blocks = blocks_of(len(images.catalogue), config)
    wanted = [(view, number) for view in range(config.views) for number in range(len(blocks))]
    own = wanted[worker.rank :: worker.world_size]
    for view, number in progress(own, total=len(own), title=folder.name):
        path = block_path(folder, view, number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                encoded = encode(torch.arange(*blocks[number]), view)
            with atomic_path(path) as unfinished:
                torch.save(encoded.cpu(), unfinished)
    wait(worker)
    return EncodedImages(folder, len(images.catalogue), config)


def fit_encoders(
    features: EncodedImages,
    labels: Int64[np.ndarray, " item"],
    half: Int64[np.ndarray, " item"],
    model_folder: Path,
    folder: Path,
    config: TrainingConfig,
) -> None:
    """Writes three models, their projections fitted to half 0, to half 1, and to both."""
    for name, is_used in (("encoder-0", half == 0), ("encoder-1", half == 1), ("encoder-all", half >= 0)):
        fit_encoder(features, labels, np.flatnonzero(is_used), model_folder, folder / name, config)


def fit_encoder(
    features: EncodedImages,
    labels: Int64[np.ndarray, " item"],
    used: Int64[np.ndarray, " used"],
    model_folder: Path,
    out: Path,
    config: TrainingConfig,
) -> None:
    """Writes the model with projections fitted to `config.fit_images` of the items `used`, unless it is there."""
    if (out / "config.json").is_file():
        return
    generator = np.random.default_rng([config.seed, 0xF17])
    items = tensor_of(np.sort(generator.permutation(used)[: config.fit_images]))
    model = load_model(model_folder)
    assert isinstance(model, FittedModel), "only fitted models have projections to fit"
    model.fit_encoder(features.plain(items), tensor_of(labels)[items])
    save_model(model, out)


def fit_start(
    images: DecodedImages,
    labels: Int64[np.ndarray, " item"],
    trained: Int64[np.ndarray, " trained"],
    model_folder: Path,
    folder: Path,
    worker: Worker,
) -> Path:
    """The folder of the model that training of a backbone starts from: its projections fit the untrained backbone.

    Only labels of the items `trained` are used.
    """
    model = load_model(model_folder).prepare_for_inference(worker.device)
    assert isinstance(model, FittedModel), "only fitted models have projections to fit"
    features = compute(
        images, folder / "features", worker, lambda items, view: model.local_features(images.view(items, view))
    )
    if worker.rank == 0:
        fit_encoder(features, labels, trained, model_folder, folder / "encoder-start", images.config)
    wait(worker)
    return folder / "encoder-start"


def load_fitted(folder: Path) -> FittedModel:
    """The model in `folder`, on the CPU."""
    model = load_model(folder)
    assert isinstance(model, FittedModel), "only fitted models are cross-fitted"
    return model
