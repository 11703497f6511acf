"""Training as one worker sees it: runs, epochs, validation figures, best weights, early stopping.

`train_all` is the only loop. In one process `fit` calls it; on a cluster `cluster.training.fit` lets every worker call
it, with another `TrainingWorker` and another way to keep the states.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.settings import fusion_figure
from distributed_rerank.chain.trials import try_chain
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model
from distributed_rerank.runtime.devices import keep_freed_memory, one_order_of_sums, pick_device, torch_threads
from distributed_rerank.storage import begun
from distributed_rerank.training import tracking
from distributed_rerank.training.encodings import FittedModel, encode_images, fit_start
from distributed_rerank.training.epoch import train_epoch
from distributed_rerank.training.evidence import evidence_of
from distributed_rerank.training.images import (
    MAX_PAIRS,
    CachedPairFeatures,
    DecodedImages,
    EncodedImages,
    FeatureModel,
    TrainingImages,
)
from distributed_rerank.training.plan import plan_digest, seed_of
from distributed_rerank.training.state import (
    TrainingState,
    build_optimizer,
    freeze_encoder,
    load_latest,
    save_epoch,
    state_copy,
)
from distributed_rerank.training.task import (
    Report,
    State,
    TrainingRun,
    TrainingTask,
    TrainingWorker,
    plan_epoch,
)
from distributed_rerank.training.validation import encode_all, is_remining_due, mine_again, score_lists_together

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""In the folder of a training: its last states."""
HEAD_FIT_PAIRS = 4096
HEAD_FIT_PAIRS_FROM_FILES = 512
"""The number of pairs where images must be decoded and encoded for them."""


@dataclass(frozen=True)
class WorkerInputs:
    """A worker, its images and starting weights; the same for all runs of a task."""

    worker: TrainingWorker
    images: DecodedImages | EncodedImages
    model_folder: Path
    folder: Path

    def load(self, config: TrainingConfig) -> PairwiseModel:
        """The model that a run starts from, with everything frozen that the run may not change."""
        model = load_model(self.model_folder).to(self.worker.device)
        if self.images.is_encoded:
            freeze_encoder(model)
        elif config.backbone_lr == 0:
            model.freeze_backbone()
        elif config.gradient_checkpointing:
            model.checkpoint_gradients()
        return model


def train_all(
    task: TrainingTask, folder: Path, worker: TrainingWorker, restored: State | None, report: Report
) -> State:
    """Trains the task's runs and returns the last state; goes on from `restored`, the state of a stopped training.

    After each epoch `report` gets the state with the epoch's figures, on every worker. `folder` is shared by the
    workers and holds encodings and TensorBoard files. Raises BadInput where the restored state was trained on another
    plan.
    """
    state: State = restored or {"finished": [], "current": None}
    keep_freed_memory()
    with torch_threads(task.config.threads), one_order_of_sums(torch.device(worker.device)):
        inputs = prepare_inputs(task, folder, worker)
        for number in range(len(state["finished"]), len(task.runs)):
            finished = state["finished"]

            def report_run(current: State, figures: dict[str, float], finished: list[State] = finished) -> None:
                report({"finished": finished, "current": current}, figures)

            current = train_run(task, task.runs[number], inputs, state["current"], report_run)
            state = {"finished": finished, "current": current}
            if number + 1 < len(task.runs):
                state = {"finished": [*finished, result_of(current)], "current": None}
    return state


def results(state: State) -> list[State]:
    """Of each run in order: history and best (figure, epoch, model, logits)."""
    return [*state["finished"], result_of(state["current"])]


def result_of(state: State) -> State:
    """The part of a finished run's state that is kept."""
    return {"history": state["history"], "best": state["best"]}


def prepare_inputs(task: TrainingTask, folder: Path, worker: TrainingWorker) -> WorkerInputs:
    """Encodings where training cannot change them, else the image files."""
    model = load_model(task.model_folder)
    note_device(model, folder, worker)
    decoded = DecodedImages(task.catalogue, model.transform, task.config, worker.device)
    labels, encodings = task.catalogue.labels.astype(np.int64), folder / "encodings"
    # Encodings are kept where the backbone stays as it is and they are more than the pixels.
    if task.config.backbone_lr > 0 or model.encoding_dtype == torch.uint8:
        start = task.model_folder
        if isinstance(model, FittedModel):
            start = fit_start(decoded, labels, task.runs[-1].anchors.query_items.numpy(), start, encodings, worker)
        return WorkerInputs(worker, decoded, start, folder)
    encoded, start = encode_images(decoded, labels, task.half, task.model_folder, encodings, worker)
    return WorkerInputs(worker, encoded, start, folder)


def note_device(model: PairwiseModel, folder: Path, worker: TrainingWorker) -> None:
    """Remember in `folder` what the workers compute with.

    Raises BadInput, in all workers alike, where they differ or where `folder` was begun with something else.
    """
    found = model.extractor.computed_with(torch.device(worker.device))
    is_so = torch.tensor([found.device == "cuda", found.precision == "bfloat16"], device=worker.device)
    shares = worker.all_reduce(is_so.float()) / worker.world_size
    if not bool(((shares == 0) | (shares == 1)).all()):
        raise BadInput(
            f"some workers compute with precision={found.precision} on {found.device}, others do not; "
            "give --extractor-precision fp32, or workers of one kind"
        )
    begun.refuse_other(folder, found)
    if worker.rank == 0:
        begun.remember(folder, found)


def train_run(
    task: TrainingTask, run: TrainingRun, inputs: WorkerInputs, restored: State | None, report: Report
) -> State:
    """Trains one model until `is_over`; returns its last state."""
    model = inputs.load(task.config)
    if isinstance(model, FittedModel):
        fit_head(model, task, run, inputs.images, inputs.worker.device)
    images = cache_pair_features(model, task, run, inputs.images)
    state = TrainingState(model, build_optimizer(model, task.config))
    if restored is not None:
        state.restore(restored)
        check_plan(task, run, state)
    elif task.config.patience and isinstance(model, DistanceSiamese):
        keep_start(task, run, state, images, inputs.worker)
    trackers: list[tracking.Tracker] = []
    if inputs.worker.rank == 0:
        trackers = tracking.trackers_of(inputs.folder, run.name, state.step, task.tracked)
    while not is_over(state.history, task.config):
        run_epoch(task, run, state, images, inputs.worker, trackers)
        report(state.to_dict(), state.history[-1])
    for tracker in trackers:
        tracker.close()
    return state.to_dict()


def keep_start(
    task: TrainingTask, run: TrainingRun, state: TrainingState, images: TrainingImages, worker: TrainingWorker
) -> None:
    """Makes the weights that a run starts from, as epoch 0, the ones to keep until an epoch has a better figure.

    For a model that is as good as the first stage before it is trained: training must not make the extractor worse.
    """
    figures, logits = validate(task, run, state.model, images, worker)
    if figures:
        state.best = {
            "figure": figures["figure"], "epoch": 0, "model": state_copy(state.model), "logits": logits
        }  # fmt: skip


def fit_head(
    model: Any, task: TrainingTask, run: TrainingRun, images: DecodedImages | EncodedImages, device: str
) -> None:
    """Fits the head's normalisation to a seeded sample of the run's pairs, the same on every worker."""
    # [anchor, candidate] tables of both sides of each pair and their distances; `places` [pair, 2] are row and column.
    items, distances = run.anchors.items, run.anchors.distances
    queries = run.anchors.query_items[:, None].expand_as(items)
    places = (items >= 0).nonzero()
    generator = torch.Generator().manual_seed(seed_of(task.config.seed, HEAD_FIT_PAIRS))
    n_pairs = HEAD_FIT_PAIRS if images.is_encoded else HEAD_FIT_PAIRS_FROM_FILES
    chosen = torch.randperm(len(places), generator=generator)[:n_pairs].sort().values
    rows, columns = places[chosen].T
    with torch.no_grad():
        query, gallery = (
            encode_all(model, images, table[rows, columns], task.config, device).to(device)
            for table in (queries, items)
        )
    model.fit_head(query, gallery, distances[rows, columns].to(device))


def cache_pair_features(
    model: PairwiseModel, task: TrainingTask, run: TrainingRun, images: DecodedImages | EncodedImages
) -> TrainingImages:
    """Features of the run's pairs where they can be computed once and kept; else the images as they are."""
    lists = [run.anchors] if run.validation is None else [run.anchors, run.validation]
    n_pairs = sum(part.items.numel() for part in lists)
    is_fixed = isinstance(images, EncodedImages) and task.config.views == 1 and n_pairs <= MAX_PAIRS
    if is_fixed and isinstance(model, FeatureModel) and isinstance(images, EncodedImages):
        return CachedPairFeatures(model, images, lists)
    return images


def is_over(history: list[dict[str, float]], config: TrainingConfig) -> bool:
    """Whether a run ends after the epochs in `history`: all done, time over, or no better figure for `patience`."""
    if len(history) >= config.epochs:
        return True
    if config.minutes is not None and sum(entry["seconds"] for entry in history) >= 60 * config.minutes:
        return True
    figures = [entry["figure"] for entry in history if "figure" in entry]
    since_best = len(figures) - 1 - figures.index(max(figures)) if figures else 0
    return 0 < config.patience <= since_best


def run_epoch(
    task: TrainingTask,
    run: TrainingRun,
    state: TrainingState,
    images: TrainingImages,
    worker: TrainingWorker,
    trackers: list[tracking.Tracker],
) -> None:
    """One epoch and its figures; decides whether its weights are the ones to keep."""
    started = time.monotonic()
    if is_remining_due(state.epoch, task.config):
        state.order = mine_again(state.model, images, run.anchors, task.config, worker)
    steps = plan_epoch(task, run, state.epoch, state.order)

    def show(step: int, figures: dict[str, float]) -> None:
        for tracker in trackers:
            tracker.log({f"train/{name}": value for name, value in figures.items()}, step)

    losses = train_epoch(state, steps, images, task.config, worker, show)
    figures, logits = validate(task, run, state.model, images, worker)
    # One clock decides for all workers when the time is over.
    seconds = torch.tensor([time.monotonic() - started if worker.rank == 0 else 0.0], device=worker.device)
    entry = {"loss": sum(losses) / len(losses), **figures, "seconds": float(worker.all_reduce(seconds)[0])}
    state.history = [*state.history, entry]
    state.plan_digest = plan_digest(steps)
    if task.config.patience == 0 or not state.best or entry.get("figure", 1.0) > state.best["figure"]:
        kept = {"model": state_copy(state.model), "logits": logits}
        state.best = {"figure": entry.get("figure", 0.0), "epoch": state.epoch, **kept}
    show_epoch(run, state, trackers, is_logging=worker.rank == 0)


def validate(
    task: TrainingTask, run: TrainingRun, model: PairwiseModel, images: TrainingImages, worker: TrainingWorker
) -> tuple[dict[str, float], Tensor | None]:
    """Figures of the model if training ended now, with its logits of the validation lists; nothing without lists."""
    if run.validation is None:
        return {}, None
    logits = score_lists_together(model, images, run.validation, task.config, worker)
    evidence = evidence_of(task, run.validation, logits)
    figures = fusion_figure(evidence)
    first_stage = try_chain(evidence, Chain()).figures()["map@10"]
    return {"figure": figures["map@10"], "cmc@1": figures["cmc@1"], "first_stage": first_stage}, logits


def show_epoch(run: TrainingRun, state: TrainingState, trackers: list[tracking.Tracker], is_logging: bool) -> None:
    """The last epoch's figures in the log and with the trackers."""
    entry = state.history[-1]
    for tracker in trackers:
        tracker.log({f"epoch/{name}": value for name, value in entry.items()}, state.step)
    if is_logging and "figure" in entry:
        logger.info(
            "%s, epoch %d: loss %.4f, mAP@10 on labels not trained on %.4f (first stage %.4f), %.1f s",
            run.name, state.epoch, entry["loss"], entry["figure"], entry["first_stage"], entry["seconds"],
        )  # fmt: skip
    elif is_logging:
        logger.info("%s, epoch %d: loss %.4f, %.1f s", run.name, state.epoch, entry["loss"], entry["seconds"])


def check_plan(task: TrainingTask, run: TrainingRun, state: TrainingState) -> None:
    """Raises BadInput where the epoch before the restored state would be planned otherwise today."""
    if state.epoch and plan_digest(plan_epoch(task, run, state.epoch - 1, state.order)) != state.plan_digest:
        raise BadInput(
            f"the checkpoint of epoch {state.epoch} was trained on other pairs than are planned now; "
            "remove the unfinished run's folder or choose another --out"
        )


def fit(task: TrainingTask, folder: Path) -> State:
    """Trains in this process, with the states in `folder`/checkpoints; goes on from the last one there."""

    def report(state: State, figures: dict[str, float]) -> None:
        keep_state(state, folder)

    worker = TrainingWorker(device=str(pick_device()))
    return train_all(task, folder, worker, load_latest(folder / CHECKPOINTS), report)


def keep_state(state: State, folder: Path) -> None:
    """Write what a stopped training goes on from to `folder`/checkpoints."""
    n_epochs = state["current"]["epoch"] + sum(len(result["history"]) for result in state["finished"])
    save_epoch(state, folder / CHECKPOINTS, n_epochs)
