"""What a chain is chosen on: candidate lists of labels that the model was not trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from distributed_rerank import retrieval
from distributed_rerank.chain.evidence import Evidence, Things
from distributed_rerank.config.training import Target
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.texts import Texts
from distributed_rerank.executors import Executors
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors import metrics
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.label_split import FEW_LABELS, usable_labels
from distributed_rerank.tensors.things import count_relevant_things
from distributed_rerank.training.task import State, TrainingTask, join_lists, validation_lists

BESIDE_EACH, MAX_BESIDE = 3, 20_000
"""Most images of labels that the extractor has seen, for each other image and altogether (`seen_beside`)."""

MANY_IMAGES = 20_000
"""So many that the labels set aside show enough, however few they are."""


def retrieve_among(
    items: Int64[np.ndarray, " image"],
    images: Catalogue,
    embeddings: Embeddings,
    n_items: int,
    folder: Path,
    executors: Executors | None = None,
) -> CandidateLists:
    """Candidates of each of these items among them, one row per item in their order, as items of `images`."""
    among = images.take(items).as_query_and_gallery()
    local = retrieval.retrieve(among, embeddings, n_items, folder, executors=executors).of_queries(
        torch.arange(len(items))
    )
    # [item, candidate]: rows in the order of `items`, and item numbers of `images` instead of those among `items`.
    numbers = torch.from_numpy(items)
    return CandidateLists(numbers, torch.where(local.items >= 0, numbers[local.items], -1), local.distances)


def evidence_of(task: TrainingTask, lists: CandidateLists, logits: Float[Tensor, "query top_n"] | None) -> Evidence:
    """`evidence_from` the task's images."""
    return evidence_from(
        task.catalogue, task.embeddings, lists, logits, task.config.target, task.families, task.is_beside
    )


def evidence_from(
    catalogue: Catalogue,
    embeddings: Float[Tensor, "item dim"],
    lists: CandidateLists,
    logits: Float[Tensor, "query top_n"] | None,
    target: Target,
    families: Int64[np.ndarray, " label"] | None = None,
    is_beside: Bool[np.ndarray, " image"] | None = None,
) -> Evidence:
    """These lists with the logits of their first candidates, their items numbered 0, 1, ... among themselves.

    The lists must hold all images of a label, so that the relevant items of each can be counted among them. Images
    that stand beside them are of labels that the extractor has seen.
    """
    # [query] ascending item numbers, [query, candidate] item numbers -> places among the queries, -1 = none.
    items = lists.query_items
    local = torch.where(lists.items >= 0, torch.searchsorted(items, lists.items.clamp(min=0)), -1)
    labels, sequences = (tensor_of(codes)[items].long() for codes in (catalogue.labels, catalogue.sequences))
    everyone = torch.arange(len(items))
    n_relevant = metrics.count_relevant(everyone, labels, sequences, everyone, labels, sequences)
    own_lists = CandidateLists(everyone, local, lists.distances)
    things = None
    if catalogue.things is not None:
        numbers = tensor_of(catalogue.things)[items]
        things = Things(numbers, count_relevant_things(everyone, everyone, labels, sequences, numbers))
    # [item] the family of each one's label; images without a label have none.
    of_items = None if families is None else torch.from_numpy(families)[labels.clamp(min=0)].where(labels >= 0, -1)
    is_seen = None if is_beside is None or not is_beside[items].any() else torch.from_numpy(is_beside)[items]
    return Evidence(own_lists, labels, n_relevant, logits, embeddings[items], target, things, of_items, is_seen)


def evidence_on_all_labels(task: TrainingTask) -> Evidence | None:
    """All train labels, for the chain steps that need no model; None where the runs' validation shows as much.

    Few labels are searched in one gallery, if no adapter was fitted to them: in halves they are ranked too well for any
    step to show a gain. A model that is trained once is measured on the labels set aside alone, but these steps may be
    measured on the labels that it is trained on too.
    """
    labels = task.catalogue.labels.astype(np.int64)
    if len(labels) > MANY_IMAGES:
        return None
    if len(usable_labels(labels)) <= FEW_LABELS and not task.start.steps:
        return evidence_of(task, lists_in_one_gallery(task), None)
    has_beside = task.is_beside is not None and bool(task.is_beside.any())
    if task.half is not None or has_beside:
        return None
    (run,) = task.runs
    assert run.validation is not None, "a model that is trained once has labels set aside"
    return evidence_of(task, join_lists([run.anchors, run.validation]), None)


def lists_in_one_gallery(task: TrainingTask) -> CandidateLists:
    """Candidates of each image among all others."""
    items, sequences = torch.arange(len(task.catalogue)), tensor_of(task.catalogue.sequences).long()
    return nearest(
        task.embeddings, task.embeddings, query_items=items, gallery_items=items, n_items=task.config.n_items,
        query_sequences=sequences, gallery_sequences=sequences,
    )  # fmt: skip


def evidence_without_model(task: TrainingTask) -> Evidence:
    """The validation lists of all runs together, for the chain steps that need no model."""
    return evidence_of(task, validation_lists(task), None)


def evidence_of_runs(task: TrainingTask, of_runs: Sequence[State]) -> Evidence:
    """The validation lists of all runs together, each with logits of a model that was not trained on its labels."""
    measured = [
        (run.validation, result["best"]["logits"])
        for run, result in zip(task.runs, of_runs, strict=True)
        if run.validation is not None
    ]
    width = max(logits.shape[1] for _, logits in measured)
    padded = [pad(logits, (0, width - logits.shape[1]), value=torch.nan) for _, logits in measured]
    order = torch.cat([lists.query_items for lists, _ in measured]).argsort()
    return evidence_of(task, validation_lists(task), torch.cat(padded)[order])


def seen_beside(seen: Catalogue | None, n_own: int, seed: int) -> tuple[Texts, Texts]:
    """Ids of images of labels that the extractor has seen, to stand beside the images of either side in its gallery.

    They are candidates, never queries: negatives where a model is trained. A few labels among themselves are ranked so
    well that no step can show a gain; with others around them they are ranked about as new photos in a real gallery
    are. A model that is judged among such images must have been trained against them.
    The labels are drawn by `seed` and halved; there are at most `BESIDE_EACH` such images for each of `n_own` images.
    """
    if seen is None:
        return Texts([]), Texts([])
    drawn = drawn_labels(seen, min(MAX_BESIDE, BESIDE_EACH * n_own), seed)
    is_first = np.random.default_rng([seed, 0xBE5]).permutation(len(drawn.label_names)) % 2 == 0
    return Texts(drawn.ids[is_first[drawn.labels]]), Texts(drawn.ids[~is_first[drawn.labels]])


def drawn_labels(images: Catalogue, most: int, seed: int) -> Catalogue:
    """All images of labels drawn by `seed`, at most `most` images; none without a label."""
    labels, counts = np.unique(images.labels[images.labels >= 0], return_counts=True)
    order = np.random.default_rng([seed, 0xC0D]).permutation(len(labels))
    kept = labels[order][counts[order].cumsum() <= most]
    return images.take(np.flatnonzero(np.isin(images.labels, kept)))
