"""The training stage: a catalogue and configs in, a complete model folder out. Layer 3.

embed the train images -> set labels aside -> retrieve candidates on either side -> fit -> choose the chain ->
write. Everything is done in the staging folder of the fingerprint, so the same command goes on after a kill.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch.nn.functional import pad

from distributed_rerank import extraction, retrieval
from distributed_rerank.chain import choice as chain_choice
from distributed_rerank.chain.chain import Chain, read_chain, write_chain
from distributed_rerank.chain.choice import Evidence
from distributed_rerank.config.jobs import TrackingService
from distributed_rerank.config.pairwise import PairwiseConfig, pairwise_name
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import artifacts
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.executors import Executors
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.saving import build_model, load_model, save_extractor, save_model
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.training import mining, tracking
from distributed_rerank.training import run as training_run
from distributed_rerank.training.card import CARD, model_card
from distributed_rerank.training.distillation import Teacher, check_teachable, score_by_teacher
from distributed_rerank.training.encodings import FittedModel
from distributed_rerank.training.run import State
from distributed_rerank.training.set_aside import halves, sides
from distributed_rerank.training.state import load_state
from distributed_rerank.training.task import Run, TrainingTask, evidence_of, join_lists

logger = logging.getLogger(__name__)

EXTRACTOR_WEIGHTS = "extractor.safetensors"
"""In the folder of a DistanceSiamese: its network, to be used as an extractor."""

Fit = Callable[[TrainingTask, Path], State]
"""A step: trains in a folder that may hold what a stopped run left, and returns the last state."""


def train(
    catalogue: Catalogue,
    model_config: PairwiseConfig,
    config: TrainingConfig,
    out: str | Path,
    *,
    work: WorkConfig | None = None,
    executors: Executors | None = None,
    fit: Fit = training_run.fit,
    teacher: Teacher | None = None,
    embeddings_folder: str | Path | None = None,
    services: Sequence[TrackingService] = (),
    overwrite: bool = False,
) -> Chain:
    """Trains a pairwise model on the train split and chooses its chain; returns the chain.

    `out` gets config.json and model.safetensors (`models.saving`), chain.json, training.json (config and
    history), README.md (the model card), mining.json, suspects.parquet, curves.svg and tensorboard/. A folder made
    with the same fingerprint is left as it is.
    `model_config` is the config dataclass of one of the pairwise models. A `teacher` scores the mined pairs with
    `score` before training. Embeddings are taken from and added
    to `embeddings_folder` if there is one.

    Raises BadInput for a catalogue that cannot be trained on, a folder made otherwise, a tracker not
    installed.
    """
    work, executors = work or WorkConfig(), executors or Executors()
    tracking.check_services(services)
    if teacher is not None:
        check_teachable(config)
    images = catalogue.restrict("train").as_query_and_gallery()
    fingerprint = fingerprint_of(images, work, model_config, config, teacher)
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        logger.info("%s is complete", out)
        return read_chain(Path(out))
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        scratch = staging.path / "work"
        embeddings = extraction.embed(
            images,
            model_config.extractor,
            embeddings_folder or scratch / "embeddings",
            work=work,
            extract=executors.extract,
        )
        task = make_task(images, embeddings, model_config, config, scratch, executors.search)
        log_mining_report(task, embeddings, scratch, staging.path, executors.search)
        if teacher is not None:
            lists = task.runs[-1].anchors
            logits = score_by_teacher(teacher, task.catalogue, lists, scratch / "teacher", work, executors.score)
            task = replace(task, teacher=logits)
        run_name = f"{Path(out).name}-{artifacts.json_digest(fingerprint)[:8]}"
        state = fit(replace(task, services=tuple(services), run_name=run_name), scratch / "run")
        chain = write_model(task, state, scratch / "run", staging.path)
        staging.remember_from(scratch / "run")
        shutil.rmtree(scratch)
        staging.finish({"chain": chain.describe(), "runs": [run.name for run in task.runs]}, rows=len(task.catalogue))
    return chain


def fingerprint_of(
    images: Catalogue,
    work: WorkConfig,
    model_config: PairwiseConfig,
    config: TrainingConfig,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """All that decides a trained model."""
    return artifacts.make_fingerprint(
        "train",
        catalogue=images.digest(),
        extraction=extraction.embedding_settings(model_config.extractor, work),
        model={"name": pairwise_name(model_config), **asdict(model_config)},
        training=config.fingerprint(),
        **({} if teacher is None else {"teacher": teacher.fingerprint()}),
    )


def make_task(
    images: Catalogue,
    embeddings: Embeddings,
    model_config: PairwiseConfig,
    config: TrainingConfig,
    work: Path,
    search: retrieval.Search,
) -> TrainingTask:
    """Which labels are trained on and which judged, the candidates among them, and the untrained model on
    disk.

    A model with projections to fit is trained on either half of the labels and judged on the other, then on
    all. Any other is trained on the labels that are not set aside and judged on those.
    """
    images = images.take(np.flatnonzero(embeddings.rows_of(images.ids) >= 0))
    model_folder = work / "untrained"
    if not (model_folder / "config.json").is_file():
        save_model(build_model(model_config), model_folder)
    is_halved = isinstance(load_model(model_folder), FittedModel) and config.backbone_lr == 0
    side = halves(images.labels, config.seed) if is_halved else sides(images.labels, config.set_aside, config.seed)
    first, second = (
        retrieve_among(
            np.flatnonzero(side == number), images, embeddings, config.n_items, work / f"candidates-{number}", search
        )
        for number in (0, 1)
    )
    if is_halved:
        runs = (
            Run("half-0", first, second),
            Run("half-1", second, first),
            Run("all", join_lists([first, second]), None),
        )
    else:
        runs = (Run("train", first, second),)
    return TrainingTask(
        catalogue=images,
        config=config,
        model_folder=model_folder,
        embeddings=tensor_of(embeddings.matrix[embeddings.rows_of(images.ids)]),
        runs=runs,
        half=side if is_halved else None,
    )


def retrieve_among(
    items: Int64[np.ndarray, " image"],
    images: Catalogue,
    embeddings: Embeddings,
    n_items: int,
    folder: Path,
    search: retrieval.Search,
) -> CandidateLists:
    """Candidates of each of these items among them, one row an item in their order, in the numbers of
    `images`."""
    found = retrieval.retrieve(
        images.take(items).as_query_and_gallery(),
        embeddings,
        n_items,
        folder,
        search=search,
    )
    lists = np.full((len(items), found.items.shape[1]), -1, np.int64)
    distances = np.full(lists.shape, np.inf, np.float32)
    lists[found.query_items] = np.where(found.items >= 0, items[found.items], -1)
    distances[found.query_items] = found.distances
    return CandidateLists(items, lists, distances)


def log_mining_report(
    task: TrainingTask, embeddings: Embeddings, work: Path, folder: Path, search: retrieval.Search
) -> None:
    """Logs what mining found and writes it into `folder`."""
    everyone = np.arange(len(task.catalogue))
    nearest = retrieve_among(everyone, task.catalogue, embeddings, mining.SUSPECT_NEIGHBOURS, work / "nearest", search)
    logger.info("%s", mining.mining_in_text(mining.write_mining(task, nearest, folder)))


def write_model(task: TrainingTask, state: State, run_folder: Path, folder: Path) -> Chain:
    """The weights to keep, the chain that the labels not trained on choose for them, and how training
    went."""
    results = training_run.results(state)
    fitted = run_folder / "encodings" / "encoder-all"
    model = load_model(task.model_folder if task.half is None else fitted)
    load_state(model, results[-1]["best"]["model"])
    save_model(model, folder)
    if isinstance(model, DistanceSiamese):
        save_extractor(model.extractor, folder / EXTRACTOR_WEIGHTS)
    chain = chain_choice.choose(evidence_of_runs(task, results), task.config.seed)
    write_chain(chain, folder)
    (folder / CARD).write_text(model_card(task, model, chain))
    histories = {run.name: result["history"] for run, result in zip(task.runs, results, strict=True)}
    figures = {
        name: [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
        for name, history in histories.items()
    }
    kept = {run.name: result["best"]["epoch"] for run, result in zip(task.runs, results, strict=True)}
    content = {"config": task.config.fingerprint(), "kept_epoch": kept, "history": figures}
    artifacts.write_json(folder / "training.json", content)
    tracking.draw_curves(histories, folder / "curves.svg")
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    shutil.copytree(run_folder / "tensorboard", folder / "tensorboard")
    return chain


def evidence_of_runs(task: TrainingTask, results: Sequence[State]) -> Evidence:
    """The lists of all judged runs together, each with logits of a model that was not trained on its
    labels."""
    judged = [
        (run.validation, result["best"]["logits"])
        for run, result in zip(task.runs, results, strict=True)
        if run.validation is not None
    ]
    width = max(logits.shape[1] for _, logits in judged)
    padded = [pad(logits, (0, width - logits.shape[1]), value=torch.nan) for _, logits in judged]
    order = tensor_of(np.argsort(np.concatenate([lists.query_items for lists, _ in judged])))
    return evidence_of(task, join_lists([lists for lists, _ in judged]), torch.cat(padded)[order])
