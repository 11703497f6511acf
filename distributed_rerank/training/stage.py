"""The training stage: from a catalogue and configs to a complete model folder.

Embed the train images, set labels aside, retrieve candidates on either side, fit, choose the chain, write. All work is
done in the staging folder of the fingerprint, so the same command goes on after a kill.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from distributed_rerank import extraction
from distributed_rerank.chain.chain import Chain, read_chain, write_chain
from distributed_rerank.chain.choice import choose, choose_views
from distributed_rerank.chain.promise import promise_in_words, promise_of
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.jobs import TrackingService
from distributed_rerank.config.pairwise import PairwiseConfig, pairwise_name
from distributed_rerank.config.training import EvidenceConfig, TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.rejects import Reject, check_rejects, reject_table
from distributed_rerank.data.texts import Texts
from distributed_rerank.data.trained_on import TrainedOn, are_normalised, spread_of, write_trained_on
from distributed_rerank.errors import BadInput, TakenFolder
from distributed_rerank.executors import Executors
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.saving import build_model, load_model, save_extractor, save_model
from distributed_rerank.models.weights import label_digest
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import write_json
from distributed_rerank.storage.paths import scheme_of
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.label_split import usable_labels
from distributed_rerank.training import mining, tracking
from distributed_rerank.training.adaptation import Adaptation, choose_adaptation
from distributed_rerank.training.card import CARD, model_card
from distributed_rerank.training.distillation import TableTeacher, Teacher, check_teachable, score_by_teacher
from distributed_rerank.training.encodings import FULL_ENCODER, FittedModel, holds_model, keep_model
from distributed_rerank.training.evidence import (
    evidence_from,
    evidence_of_runs,
    evidence_on_all_labels,
    evidence_without_model,
    retrieve_among,
    seen_beside,
)
from distributed_rerank.training.run import fit as fit_in_this_process
from distributed_rerank.training.run import results
from distributed_rerank.training.seen_labels import LabelsToUse, check_enough_labels, pick_labels
from distributed_rerank.training.services import add_result, check_services, opened
from distributed_rerank.training.sides import sides
from distributed_rerank.training.state import load_state
from distributed_rerank.training.task import (
    Fit,
    State,
    TrainingRun,
    TrainingTask,
    join_lists,
    validation_lists,
)

logger = logging.getLogger(__name__)

EXTRACTOR_WEIGHTS = "extractor.safetensors"
"""In the folder of a DistanceSiamese: its network, to be used as an extractor."""


def train(
    catalogue: Catalogue,
    model_config: PairwiseConfig,
    config: TrainingConfig,
    out: str | Path,
    *,
    work: WorkConfig | None = None,
    executors: Executors | None = None,
    fit: Fit = fit_in_this_process,
    teacher: Teacher | TableTeacher | None = None,
    embeddings_folder: str | Path | None = None,
    evidence: EvidenceConfig | None = None,
    services: Sequence[TrackingService] = (),
    overwrite: bool = False,
) -> Chain:
    """Trains a pairwise model on the train split and chooses its chain; returns the chain.

    `out` gets config.json and model.safetensors (`models.saving`), chain.json, training.json (config and history),
    README.md (the model card), trained_on.json, mining.json, suspects.parquet, curves.svg and, where TensorBoard is
    installed, tensorboard/. A complete folder with the same fingerprint is left as it is. `model_config` is the config
    of one of the pairwise models. A `teacher` scores the mined pairs before training. Embeddings are read from and
    added to `embeddings_folder` if there is one; any other table of embeddings is taken as it is. `evidence` says which
    labels the extractor has seen (`seen_labels`): without labels that it has not seen, the chain is the first stage.

    Raises BadInput for a catalogue that cannot be trained on, a folder made otherwise, a tracker not installed.
    """
    work = work or WorkConfig()
    check_services(services)
    check_teachable(config, teacher)
    evidence = evidence or EvidenceConfig()
    check_enough_labels(catalogue, evidence)
    given = None if embeddings_folder is None else extraction.embeddings_of_others(Path(embeddings_folder))
    fingerprint = fingerprint_of(catalogue, work, model_config, config, teacher, evidence, given)
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        logger.info("%s is complete", out)
        return read_chain(Path(out))
    run_name = f"{Path(out).name}-{artifacts.json_digest(fingerprint)[:8]}"
    with opened(services, run_name, fingerprint) as tracked, artifacts.stage(out, fingerprint, overwrite) as staging:
        scratch = staging.path / "work"
        kept = Path(embeddings_folder or scratch / "embeddings")
        embed = partial(embeddings_of, given, model_config.extractor, kept, work, executors)
        used = pick_labels(catalogue, model_config.extractor.weights, evidence, embed)
        beside = seen_beside(used.seen, len(used.images), config.seed)
        images = images_with(used.images, beside, catalogue).as_query_and_gallery()
        embeddings = embed(images)
        images = without_vanished(images, embeddings, work.max_rejects, staging.path)
        own = scratch / folder_of(images)
        config = config if used.is_valid else replace(config, adapt=False)
        task = make_task(images, embeddings, model_config, config, own, executors, beside)
        log_mining_report(task, embeddings, own, staging.path, executors)
        task = taught(task, teacher, own / "teacher", work, executors)
        state = fit(replace(task, tracked=tuple(tracked), unadapted=None), own / "run")
        chain = write_model(task, state, own / "run", staging.path, used)
        write_first_stage(task, chain, embeddings, fingerprint, staging.path, given is not None)
        staging.remember_from(own / "run")
        shutil.rmtree(scratch)
        add_result(tracked, chain.chosen_on, staging.path)
        staging.finish({"chain": chain.describe(), "runs": [run.name for run in task.runs]}, rows=task.n_labelled)
    return chain


def write_first_stage(
    task: TrainingTask,
    chain: Chain,
    embeddings: Embeddings,
    fingerprint: dict[str, Any],
    folder: Path,
    from_table: bool,
) -> None:
    """Writes down what the chain stands behind: extractor, kind and spread of the distances."""
    task = task if task.unadapted is None or chain.adapter is not None else task.unadapted
    lists = validation_lists(task)
    lists = lists[(tensor_of(task.catalogue.labels)[lists.query_items] >= 0).nonzero()[:, 0]]
    is_unit = are_normalised(embeddings.blocks())
    extractor = fingerprint["extraction"]["extractor"]
    write_trained_on(TrainedOn("l2", is_unit, embeddings.dim, extractor, spread_of(lists), from_table), folder)


def folder_of(images: Catalogue) -> str:
    """A name of its own for each set of images: what a start did while one was missing is not taken for another's."""
    return f"images-{artifacts.json_digest(images.ids.tolist())[:8]}"


def taught(
    task: TrainingTask,
    teacher: Teacher | TableTeacher | None,
    folder: Path,
    work: WorkConfig,
    executors: Executors | None,
) -> TrainingTask:
    """The task with the teacher's logits of its last run's lists; without a teacher as it is."""
    if teacher is None:
        return task
    logits = score_by_teacher(teacher, task.catalogue, task.runs[-1].anchors, folder, work, executors)
    return replace(task, teacher=logits)


def embeddings_of(
    given: Embeddings | None,
    extractor: ExtractorConfig,
    folder: Path,
    work: WorkConfig,
    executors: Executors | None,
    images: Catalogue,
) -> Embeddings:
    """Embeddings of the images: those given, or computed as far as `folder` lacks them."""
    if given is not None:
        return extraction.check_complete(given, images, work.max_rejects, folder)
    try:
        return extraction.embed(images, extractor, folder, work=work, executors=executors)
    except TakenFolder as error:
        remedy = "give the extractor that these embeddings were made with, or another folder for --embeddings"
        raise BadInput(f"{error.problem}; {remedy}") from None


def fingerprint_of(
    catalogue: Catalogue,
    work: WorkConfig,
    model_config: PairwiseConfig,
    config: TrainingConfig,
    teacher: Teacher | TableTeacher | None,
    evidence: EvidenceConfig,
    given: Embeddings | None,
) -> dict[str, Any]:
    """Everything that decides a trained model."""
    return artifacts.make_fingerprint(
        "train",
        catalogue=catalogue.digest(),
        evidence=asdict(evidence),
        embeddings=None if given is None else given.digest,
        extraction=extraction.embedding_settings(model_config.extractor, work),
        model={"name": pairwise_name(model_config), **asdict(model_config)},
        training=config.fingerprint(),
        **({} if teacher is None else {"teacher": teacher.fingerprint()}),
    )


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

    Labels that the first stage takes for one another stay on one side (`tensors.look_alikes`) where lists are mined. An
    extractor, which is trained on batches, learns more from some labels of each group than from all labels of some.
    `beside` are ids of images without a label that stand in the gallery of either side (`seen_beside`). A model with
    projections to fit is trained on either half of the labels with the other half as validation, then on all labels.
    Any other model is trained on the labels that are not set aside, with those set aside as validation.
    """
    images = images.take(np.flatnonzero(embeddings.rows_of(images.ids) >= 0))
    model_folder = work / "untrained"
    if not holds_model(model_folder):
        keep_model(build_model(model_config), model_folder)
    is_halved = isinstance(load_model(model_folder), FittedModel) and config.backbone_lr == 0
    families = mining.look_alikes_of(images, embeddings, work, executors) if config.mining == "lists" else None
    labels, share = images.labels.astype(np.int64), 0.5 if is_halved else config.set_aside
    side = sides(labels, share, config.seed, families)
    n_trained = len(usable_labels(labels[side == 0]))
    if config.mining != "lists" and n_trained < config.n_labels:
        logger.info("a batch holds all %d labels that are trained on, for n_labels=%d", n_trained, config.n_labels)
    is_own = side >= 0
    for number, ids in enumerate(beside):
        places = images.ids.places_of(ids)
        side[places[places >= 0]] = number
    is_beside = (side >= 0) & ~is_own
    search = Search(images, side, config.n_items, work / "candidates", executors)
    adapted = adapt(images, embeddings, side, families, is_beside, config, search)

    def behind(choice: Adaptation) -> TrainingTask:
        steps, on = () if choice.step is None else (choice.step,), {"adapt": choice.decision}
        return TrainingTask(
            catalogue=images,
            config=config,
            model_folder=model_folder,
            embeddings=tensor_of(choice.embeddings),
            runs=runs_on(choice.lists, torch.from_numpy(is_own), is_halved),
            half=side if is_halved else None,
            is_beside=is_beside,
            families=families,
            start=Chain(steps, {} if choice.decision is None else on, adapter=choice.adapter),
        )

    return replace(behind(adapted), unadapted=None if adapted.plain is None else behind(adapted.plain))


def runs_on(
    lists: tuple[CandidateLists, CandidateLists], is_own: Bool[Tensor, " image"], is_halved: bool
) -> tuple[TrainingRun, ...]:
    """The runs on the lists of both sides: on either half in turn and then on all, or on the first side alone.

    Images beside are candidates, and so negatives, of the others, and no anchors: their labels are known.
    """
    first, second = lists
    anchors = [side[is_own[side.query_items].nonzero()[:, 0]] for side in lists]
    if not is_halved:
        return (TrainingRun("train", anchors[0], second),)
    return (
        TrainingRun("half-0", anchors[0], second),
        TrainingRun("half-1", anchors[1], first),
        TrainingRun("all", join_lists(anchors), None),
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
    families: Int64[np.ndarray, " label"] | None,
    is_beside: Bool[np.ndarray, " image"],
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
        lambda lists: evidence_from(
            images, everything, join_lists(list(lists)), None, config.target, families, is_beside
        ),
        config.seed,
        config.accept,
    )


def log_mining_report(
    task: TrainingTask, embeddings: Embeddings, work: Path, folder: Path, executors: Executors | None
) -> None:
    """Logs the figures and suspects of mining and writes them into `folder`."""
    nearest = mining.nearest_images(task.catalogue, embeddings, work, executors)
    logger.info("%s", mining.mining_in_text(mining.write_mining(task, nearest, folder)))


def write_model(
    task: TrainingTask,
    state: State,
    run_folder: Path,
    folder: Path,
    used: LabelsToUse,
) -> Chain:
    """Writes the weights to keep, the chain that the validation labels choose for them, and the training's history."""
    of_runs = dict(zip((run.name for run in task.runs), results(state), strict=True))
    kept = {name: result["best"]["epoch"] for name, result in of_runs.items()}
    has_learnt = 0 not in kept.values()
    if not has_learnt:
        logger.warning("no epoch ranks labels not trained on better than the extractor as it was: its weights are kept")
    model = load_model(task.model_folder if task.half is None else run_folder / "encodings" / FULL_ENCODER)
    load_state(model, of_runs[task.runs[-1].name]["best"]["model"])
    save_model(model, folder)
    if isinstance(model, DistanceSiamese):
        learnt = trained_labels(task) if has_learnt else set()
        save_extractor(model.extractor, folder / EXTRACTOR_WEIGHTS, used.seen_before | learnt)
    chain = Chain()
    if used.is_valid:
        chain = with_promise(choose_chain(task, list(of_runs.values())))
    chain = replace(chain, chosen_on={**chain.chosen_on, "evidence": used.note})
    write_chain(chain, folder)
    (folder / CARD).write_text(model_card(task, model, chain))
    histories = {name: result["history"] for name, result in of_runs.items()}
    figures = {
        name: [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]
        for name, history in histories.items()
    }
    content = {"config": task.config.fingerprint(), "kept_epoch": kept, "history": figures}
    write_json(folder / "training.json", content)
    tracking.draw_curves(histories, folder / "curves.svg")
    tracking.copy_event_files(run_folder / "tensorboard", folder / "tensorboard")
    return chain


def choose_chain(task: TrainingTask, of_runs: Sequence[State]) -> Chain:
    """The chain that the set-aside labels choose behind the task's adapter, and with it where that is taken."""
    seed, accept, plain = task.config.seed, task.config.accept, task.unadapted
    evidence, start = evidence_of_runs(task, of_runs), task.start
    if plain is None:
        found = choose(evidence, seed, accept, evidence_on_all_labels(task))
    else:
        raw = evidence_without_model(plain)
        found = choose(evidence, seed, accept, evidence_on_all_labels(plain), raw)
        if found.is_judged_as_one:
            start = replace(start, chosen_on={"adapt": start.chosen_on["adapt"] | {"taken": True}})
        else:
            evidence, start = raw, plain.start
    found = choose_views(evidence, found, seed, accept)
    return replace(
        found, steps=(*start.steps, *found.steps), chosen_on=found.chosen_on | start.chosen_on, adapter=start.adapter
    )


def with_promise(chain: Chain) -> Chain:
    """The chosen chain with what it promises, which the log says too."""
    promise = promise_of(chain)
    if promise:
        logger.info("promise of the labels set aside: %s", promise_in_words(promise))
    return replace(chain, chosen_on={**chain.chosen_on, "promise": promise})


def trained_labels(task: TrainingTask) -> set[str]:
    """Digests of the labels that the backbone has learnt from; none where it stays as it is."""
    if task.config.backbone_lr == 0:
        return set()
    labels = np.unique(task.catalogue.labels[task.runs[-1].anchors.query_items.numpy()])
    return {label_digest(str(task.catalogue.label_names[number])) for number in labels if number >= 0}
