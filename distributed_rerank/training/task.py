"""Everything that training needs, as values: any process that gets a `TrainingTask` can take part in it.
Layer 3."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.chain.choice import Evidence
from distributed_rerank.config.jobs import TrackingService
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import metrics
from distributed_rerank.tensors.knn import Neighbours
from distributed_rerank.training.distillation import TeacherLogits
from distributed_rerank.training.plan import Step, plan_batches, plan_lists, plan_whole_batches
from distributed_rerank.training.remining import reorder


@dataclass(frozen=True)
class Run:
    """One model trained from the start: on some labels, judged on others (None: trained to its end, not
    judged)."""

    name: str
    anchors: CandidateLists
    """Candidate lists of the images trained on, among themselves."""
    validation: CandidateLists | None
    """Candidate lists of the images of other labels, among themselves."""


@dataclass(frozen=True)
class TrainingTask:
    """What is trained, on what, how; item numbers are those of the catalogue."""

    catalogue: Catalogue
    """The train images."""
    config: TrainingConfig
    model_folder: Path
    """The untrained model as `models.saving` wrote it: every worker starts from the same weights."""
    embeddings: Float[Tensor, "item dim"]
    runs: tuple[Run, ...]
    """One after the other; the last one's weights become the model's."""
    half: Int64[np.ndarray, " item"] | None = None
    """Of each item, where a model's projections are cross-fitted (`training_encodings`)."""
    services: tuple[TrackingService, ...] = ()
    run_name: str = "train"
    teacher: TeacherLogits | None = None
    """What a slow model says of the mined pairs."""


def plan_epoch(
    task: TrainingTask, run: Run, epoch: int, order: Int64[Tensor, "anchor kept"] | None = None
) -> list[Step]:
    """The steps of an epoch of a run, the same for every worker; `order` is that of a model that mined again."""
    labels = task.catalogue.labels
    if task.config.mining != "lists":
        plan = plan_batches if task.config.mining == "batch" else plan_whole_batches
        return plan(run.anchors.query_items, labels, task.embeddings, task.config, epoch)
    anchors = run.anchors if order is None else reorder(run.anchors, order)
    steps = plan_lists(anchors, labels, task.catalogue.sequences, task.embeddings, task.config, epoch)
    return steps if task.teacher is None else [task.teacher.of(step) for step in steps]


def join_lists(parts: list[CandidateLists]) -> CandidateLists:
    """The lists of disjoint sets of images, in item order."""
    width = max(part.items.shape[1] for part in parts)
    query_items = np.concatenate([part.query_items for part in parts])
    padded = [
        (
            np.pad(part.items, ((0, 0), (0, width - part.items.shape[1])), constant_values=-1),
            np.pad(part.distances, ((0, 0), (0, width - part.items.shape[1])), constant_values=np.inf),
        )
        for part in parts
    ]
    items, distances = (np.concatenate(columns) for columns in zip(*padded, strict=True))
    order = np.argsort(query_items)
    return CandidateLists(query_items[order], items[order], distances[order])


def evidence_of(task: TrainingTask, lists: CandidateLists, logits: Float[Tensor, "query top_n"] | None) -> Evidence:
    """These lists, their items numbered 0, 1, ... among themselves, with the logits of their first
    candidates.

    All images of a label must be among them: then what is relevant to an item can be counted here.
    """
    items, candidates = tensor_of(lists.query_items), tensor_of(lists.items)
    local = torch.where(candidates >= 0, torch.searchsorted(items, candidates.clamp(min=0)), -1)
    labels = tensor_of(task.catalogue.labels)[items]
    sequences = tensor_of(task.catalogue.sequences)[items]
    everyone = torch.arange(len(items))
    n_relevant = metrics.count_relevant(everyone, labels, sequences, everyone, labels, sequences)
    neighbours = Neighbours(local, tensor_of(lists.distances))
    return Evidence(neighbours, labels, n_relevant, logits, task.embeddings[items])
