"""What a training starts from: its images, the sides of their labels, and the candidate lists of either side.

Labels are in two sides. Each side has a gallery of its own: its labels' images and, where the extractor has seen other
labels, images of those beside them.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64

from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.pairwise import PairwiseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.rejects import Reject, check_rejects, reject_table
from distributed_rerank.data.texts import Texts
from distributed_rerank.executors import Executors
from distributed_rerank.models.saving import build_model, load_model
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.storage.paths import scheme_of
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.training.adaptation import Adaptation, choose_adaptation, usable_labels
from distributed_rerank.training.encodings import FittedModel, holds_model, keep_model
from distributed_rerank.training.evidence import evidence_from, retrieve_among
from distributed_rerank.training.plan import sides
from distributed_rerank.training.task import (
    TrainingRun,
    TrainingTask,
    join_lists,
)

logger = logging.getLogger(__name__)


def images_with(images: Catalogue, beside: Sequence[Texts], catalogue: Catalogue) -> Catalogue:
    """The images and those `beside` them, which are in the catalogue too; these have no label here."""
    others = np.concatenate([catalogue.items_of(ids) for ids in beside])
    if not len(others):
        return images
    both = catalogue.take(np.concatenate([catalogue.items_of(images.ids), others]))
    return both.without_labels(both.items_of(catalogue.ids[others]))


def without_vanished(images: Catalogue, embeddings: Embeddings, max_rejects: float | None, folder: Path) -> Catalogue:
    """The images that have an embedding and whose file is still there; the others go into `folder`/rejects.parquet.

    Files in a store are not asked for. Raises BadInput where too many have vanished.
    """
    images = images.take(np.flatnonzero(embeddings.rows_of(images.ids) >= 0))
    is_there = np.array([scheme_of(ref.path) is not None or os.path.exists(ref.path) for ref in images.images()])
    (folder / "rejects.parquet").unlink(missing_ok=True)
    if is_there.all():
        return images
    gone = [Reject(ref.id, ref.path, "file not found") for ref in images.images(np.flatnonzero(~is_there))]
    tables.write_table(folder / "rejects.parquet", reject_table(gone, "train"), "rejects")
    check_rejects(gone, len(images), max_rejects, str(folder / "rejects.parquet"))
    return images.take(np.flatnonzero(is_there))


def make_task(
    images: Catalogue,
    embeddings: Embeddings,
    model_config: PairwiseConfig,
    config: TrainingConfig,
    work: Path,
    executors: Executors | None = None,
    beside: Sequence[Texts] = (),
) -> TrainingTask:
    """Splits the labels, retrieves candidates on either side, and writes the untrained model to disk.

    `beside` are ids of images without a label that stand in the gallery of either side (`seen_beside`). A model with
    projections to fit is trained on either half of the labels with the other half as validation, then on all labels.
    Any other model is trained on the labels that are not set aside, with those set aside as validation.
    """
    images = images.take(np.flatnonzero(embeddings.rows_of(images.ids) >= 0))
    model_folder = work / "untrained"
    if not holds_model(model_folder):
        keep_model(build_model(model_config), model_folder)
    is_halved = isinstance(load_model(model_folder), FittedModel) and config.backbone_lr == 0
    side = sides(images.labels.astype(np.int64), 0.5 if is_halved else config.set_aside, config.seed)
    n_trained = len(usable_labels(images.labels[side == 0].astype(np.int64)))
    if config.mining != "lists" and n_trained < config.n_labels:
        logger.info("a batch holds all %d labels that are trained on, for n_labels=%d", n_trained, config.n_labels)
    is_own = side >= 0
    for number, ids in enumerate(beside):
        places = images.ids.places_of(ids)
        side[places[places >= 0]] = number
    search = Search(images, side, config.n_items, work / "candidates", executors)
    adapted = adapt(images, embeddings, side, config, search)
    # Candidates to train on are those of the same side's labels alone; the figures are those of the whole gallery.
    anchors = adapted.lists if is_own[side >= 0].all() else search(adapted.embeddings, "anchors", is_own)
    first, second = adapted.lists
    if is_halved:
        runs = (
            TrainingRun("half-0", anchors[0], second),
            TrainingRun("half-1", anchors[1], first),
            TrainingRun("all", join_lists(list(anchors)), None),
        )
    else:
        runs = (TrainingRun("train", anchors[0], second),)
    return TrainingTask(
        catalogue=images,
        config=config,
        model_folder=model_folder,
        embeddings=tensor_of(adapted.embeddings),
        runs=runs,
        half=side if is_halved else None,
        start=Chain(
            () if adapted.step is None else (adapted.step,),
            {} if adapted.decision is None else {"adapt": adapted.decision},
            adapter=adapted.adapter,
        ),
    )


@dataclass(frozen=True)
class Search:
    """The search of either side's images among themselves."""

    images: Catalogue
    side: Int64[np.ndarray, " image"]
    n_items: int
    folder: Path
    executors: Executors | None

    def __call__(
        self, matrix: Float32[np.ndarray, "image dim"], name: str, is_there: Bool[np.ndarray, " image"] | None = None
    ) -> tuple[CandidateLists, CandidateLists]:
        """Lists of both sides over these embeddings, of all their images or those that are there; in `folder`/name."""
        mapped = Embeddings(self.images.ids, matrix)
        first, second = (
            retrieve_among(
                np.flatnonzero((self.side == s) & (True if is_there is None else is_there)),
                self.images, mapped, self.n_items, self.folder / f"{name}-{s}", self.executors,
            )
            for s in (0, 1)
        )  # fmt: skip
        return first, second


def adapt(
    images: Catalogue,
    embeddings: Embeddings,
    side: Int64[np.ndarray, " image"],
    config: TrainingConfig,
    search: Search,
) -> Adaptation:
    """The lists of both sides over the embeddings as they are, or mapped where that is better for other labels."""
    own = embeddings.matrix[embeddings.rows_of(images.ids)]
    if not config.adapt or config.mining != "lists":
        return Adaptation(search(own, "plain"), own)
    everything = tensor_of(own)
    return choose_adaptation(
        own,
        images.labels.astype(np.int64),
        images.sequences.astype(np.int64),
        side,
        search,
        lambda lists: evidence_from(images, everything, join_lists(list(lists)), None, config.target),
        config.seed,
        config.accept,
    )
