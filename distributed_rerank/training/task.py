"""What every worker of a training gets: the task with its runs, and the worker's place among the others.

All are values: any process that gets a `TrainingTask` can take part in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate
from distributed_rerank.tensors.pair_values import PairValues
from distributed_rerank.training.plan import TrainingStep, plan_batches, plan_lists, reorder
from distributed_rerank.training.services import ServiceRun


@dataclass(frozen=True)
class TrainingRun:
    """One model trained from the start, with early stopping and figures on other labels where there are any."""

    name: str
    anchors: CandidateLists
    """Candidate lists of the images trained on, among themselves."""
    validation: CandidateLists | None
    """Candidate lists of the images of other labels, among themselves; None = trained to its end, not measured."""


@dataclass(frozen=True)
class TrainingTask:
    """What is trained, on what, how; item numbers are those of the catalogue."""

    catalogue: Catalogue
    """The train images; those without a label are candidates at most."""
    config: TrainingConfig
    model_folder: Path
    """The untrained model as `models.saving` wrote it: every worker starts from the same weights."""
    embeddings: Float[Tensor, "item dim"]
    runs: tuple[TrainingRun, ...]
    """Trained one after the other; the last one's weights become the model's."""
    half: Int64[np.ndarray, " item"] | None = None
    """The half (0, 1, -1 = none) of each item, where a model's projections are cross-fitted (`encodings`)."""
    is_beside: Bool[np.ndarray, " item"] | None = None
    """Images without a label in the catalogue that are negatives of every anchor."""
    families: Int64[np.ndarray, " label"] | None = None
    """One number for each label and its look-alikes."""
    tracked: tuple[ServiceRun, ...] = ()
    """Where the figures go beside the log."""
    teacher: PairValues | None = None
    """What a slow model says of the mined pairs."""
    start: Chain = field(default_factory=Chain)
    """What the chain begins with: a map of the embeddings, or nothing. Lists and embeddings are those after it."""
    unadapted: "TrainingTask | None" = None
    """Without that map, where it is judged as one with the steps behind it. No worker needs it."""

    @property
    def labels(self) -> Int64[np.ndarray, " item"]:
        """Labels to train with, -1 = none; images beside have one that no anchor has."""
        labels = self.catalogue.labels.astype(np.int64)
        return labels if self.is_beside is None else np.where(self.is_beside, labels.max() + 1, labels)

    @property
    def n_labelled(self) -> int:
        """Images with a label."""
        return int((self.catalogue.labels >= 0).sum())


State = dict[str, Any]
"""What a stopped training needs to go on: {"finished": results of finished runs, "current": state of the run in it}."""
Report = Callable[[State, dict[str, float]], None]
"""Called after each epoch with the state and the epoch's figures."""
Fit = Callable[[TrainingTask, Path], State]
"""Trains in a folder that may hold the state of a stopped training, and returns the last state."""


def no_all_reduce(tensor: Tensor) -> Tensor:
    """The sum over one worker: the tensor itself."""
    return tensor


@dataclass(frozen=True)
class TrainingWorker:
    """One of `world_size` workers that train together, and the collective that adds up their sums."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    all_reduce: Callable[[Tensor], Tensor] = no_all_reduce
    """Gives the sum of every worker's tensor to all; called by all workers equally often."""

    def barrier(self) -> None:
        """Blocks until every worker arrives."""
        self.all_reduce(torch.zeros(1, device=self.device))


def plan_epoch(
    task: TrainingTask, run: TrainingRun, epoch: int, order: Int64[Tensor, "anchor kept"] | None = None
) -> list[TrainingStep]:
    """The steps of an epoch, the same for every worker; `order` comes from a model that mined again (`validation`)."""
    labels, sequences = task.labels, task.catalogue.sequences.astype(np.int64)
    if task.config.mining != "lists":
        return plan_batches(run.anchors.query_items.numpy(), labels, task.embeddings, task.config, epoch)
    anchors = run.anchors if order is None else reorder(run.anchors, order)
    steps = plan_lists(anchors, labels, sequences, task.embeddings, task.config, epoch)
    if task.teacher is None:
        return steps
    known = task.teacher
    return [replace(step, teacher_logits=known.look_up(step.query_items, step.gallery_items)) for step in steps]


def validation_lists(task: TrainingTask) -> CandidateLists:
    """The validation lists of all runs together, in item order."""
    return join_lists([run.validation for run in task.runs if run.validation is not None])


def join_lists(parts: list[CandidateLists]) -> CandidateLists:
    """The lists of disjoint sets of images, in item order."""
    width = max(part.items.shape[1] for part in parts)
    joined = concatenate([part.padded(width) for part in parts])
    return joined[joined.query_items.argsort()]
