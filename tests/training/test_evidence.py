"""Images of labels that the extractor has seen are candidates and negatives, and never queries or positives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from training_examples import SMALL, TOKENS

from distributed_rerank.chain.chain import AdaptStep, Chain
from distributed_rerank.chain.evidence import AMONG_UNSEEN
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.training import evidence
from distributed_rerank.training.evidence import drawn_labels, evidence_of, evidence_on_all_labels, seen_beside
from distributed_rerank.training.sides import sides
from distributed_rerank.training.stage import images_with, make_task
from distributed_rerank.training.task import TrainingTask, join_lists, plan_epoch

N_LABELS, N_IMAGES, N_SEEN = 20, 5, 8


@pytest.fixture
def catalogue() -> Catalogue:
    """Labels 0 to 7 are seen; images of all labels lie between one another by id."""
    labels = [str(label) for label in range(N_LABELS)] * N_IMAGES
    ids = [f"{number:03d}" for number in range(len(labels))]
    table = pd.DataFrame({"id": ids, "label": labels, "path": ids, "split": "train", "is_query": True})
    return Catalogue(table.assign(is_gallery=True), "planted.csv")


@pytest.fixture
def points(catalogue: Catalogue) -> np.ndarray:
    state = np.random.default_rng(0)
    centres = state.standard_normal((N_LABELS, 6))
    return (centres[catalogue.labels] + state.standard_normal((len(catalogue), 6))).astype(np.float32)


def task_beside_seen(catalogue: Catalogue, points: np.ndarray, folder: Path, *, lost: int, adapt: bool) -> TrainingTask:
    """The task of labels 8 to 19; the image `lost` has no embedding."""
    is_seen = np.asarray(catalogue.labels) < N_SEEN
    own, seen = (catalogue.take(np.flatnonzero(part)) for part in (~is_seen, is_seen))
    beside = seen_beside(seen, len(own), seed=0)
    images = images_with(own, beside, catalogue).as_query_and_gallery()
    there = np.delete(np.arange(len(catalogue)), lost)
    embeddings = Embeddings(catalogue.ids[there], points[there])
    config = replace(SMALL, n_items=20, top_n=20, adapt=adapt, accept=0.51)
    return make_task(images, embeddings, TOKENS, config, folder, None, beside)


def exact_lists(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The 20 nearest of these rows for each of them, by the plain formula; -1 behind the last."""
    x = points[rows].astype(np.float64)
    distances = np.linalg.norm(x[:, None] - x, axis=2)
    np.fill_diagonal(distances, np.inf)
    found = rows[np.argsort(distances, axis=1, kind="stable")[:, : min(20, len(rows) - 1)]]
    return np.pad(found, ((0, 0), (0, 20 - found.shape[1])), constant_values=-1)


def assert_lists(lists: CandidateLists, points: np.ndarray) -> None:
    expected = exact_lists(lists.query_items.numpy(), points)
    width = lists.items.shape[1]
    assert np.array_equal(lists.items.numpy(), expected[:, :width])
    assert (expected[:, width:] == -1).all()


@pytest.mark.parametrize("adapt", [False, True])
def test_seen_labels_are_candidates_and_negatives(
    catalogue: Catalogue, points: np.ndarray, tmp_path: Path, adapt: bool
) -> None:
    lost = int(np.flatnonzero(np.asarray(catalogue.labels) < N_SEEN)[3])
    task = task_beside_seen(catalogue, points, tmp_path, lost=lost, adapt=adapt)
    labels = task.catalogue.labels
    is_own = labels >= 0
    assert task.n_labelled == is_own.sum() == (N_LABELS - N_SEEN) * N_IMAGES
    assert len(task.catalogue) == N_LABELS * N_IMAGES - 1
    assert task.start.adapt is None or adapt
    mapped = task.embeddings.numpy()
    assert np.array_equal(task.labels[is_own], labels[is_own])
    assert not np.isin(task.labels[~is_own], labels[is_own]).any()
    for run in task.runs:
        assert is_own[run.anchors.query_items].all()
        steps = plan_epoch(task, run, epoch=0)
        queries, gallery, is_negative = (
            torch.cat([getattr(step, name) for step in steps]).numpy()
            for name in ("query_items", "gallery_items", "is_negative")
        )
        assert is_own[queries].all()
        assert (~is_own[gallery]).any()
        assert np.array_equal(is_negative, labels[queries] != labels[gallery])
    of_halves = [run.validation for run in task.runs if run.validation is not None]
    for lists, other in zip(of_halves, of_halves[::-1], strict=True):
        assert_lists(lists, mapped)
        items = lists.query_items.numpy()
        assert not np.intersect1d(items, other.query_items.numpy()).size
        assert (~is_own[items]).any()
    known = evidence_of(task, join_lists(of_halves), None)
    assert np.array_equal(known.queries.numpy(), np.flatnonzero(is_own))
    assert set(known.n_relevant[known.queries].tolist()) == {N_IMAGES - 1}
    assert not is_own[known.lists.items[known.queries].numpy()].all()
    assert known.is_seen is not None
    assert np.array_equal(known.is_seen.numpy(), ~is_own)
    values = known.per_query(known.lists)
    for place, query in enumerate(known.queries.tolist()):
        unseen = [item for item in known.lists.items[query].tolist() if item >= 0 and is_own[item]]
        hits = [labels[item] == labels[query] for item in unseen[:10]]
        precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank in range(len(hits)) if hits[rank]]
        assert values[f"map@10{AMONG_UNSEEN}"][place] == pytest.approx(sum(precisions) / (N_IMAGES - 1))
        assert values[f"cmc@1{AMONG_UNSEEN}"][place] == float(hits[0])


def test_either_half_of_the_seen_labels_stands_beside_one_side(catalogue: Catalogue) -> None:
    seen = catalogue.take(np.flatnonzero(np.asarray(catalogue.labels) < N_SEEN))
    first, second = (catalogue.items_of(ids) for ids in seen_beside(seen, 100, seed=0))
    names = [set(np.asarray(catalogue.labels)[items]) for items in (first, second)]
    assert [len(part) for part in names] == [N_SEEN // 2] * 2
    assert names[0] | names[1] == set(range(N_SEEN))
    assert len(first) == len(second) == N_SEEN // 2 * N_IMAGES
    assert [len(ids) for ids in seen_beside(seen, 2, seed=0)] == [N_IMAGES, 0]
    assert [len(ids) for ids in seen_beside(None, 100, seed=0)] == [0, 0]


def test_images_without_a_label_never_stand_beside(catalogue: Catalogue) -> None:
    """Nobody knows whether they are negatives."""
    seen = catalogue.take(np.flatnonzero(np.asarray(catalogue.labels) < N_SEEN)).without_labels(np.array([0, 7, 9]))
    first, second = seen_beside(seen, 100, seed=0)
    expected = np.delete(np.array(seen.ids.tolist()), [0, 7, 9])
    assert sorted([*first.tolist(), *second.tolist()]) == expected.tolist()


def test_images_beside_have_no_label(catalogue: Catalogue) -> None:
    is_seen = np.asarray(catalogue.labels) < N_SEEN
    own, seen = (catalogue.take(np.flatnonzero(part)) for part in (~is_seen, is_seen))
    both = images_with(own, seen_beside(seen, 100, seed=0), catalogue)
    assert both.ids.tolist() == catalogue.ids.tolist()
    written = catalogue.texts("label").to_pylist()
    assert both.texts("label").to_pylist() == [None if s else text for s, text in zip(is_seen, written, strict=True)]
    assert images_with(own, seen_beside(None, 100, seed=0), catalogue) is own


@pytest.mark.parametrize(("most", "expected"), [(12, 2), (1000, N_SEEN), (4, 0)])
def test_labels_beside_are_whole_and_no_more_than_asked(catalogue: Catalogue, most: int, expected: int) -> None:
    seen = catalogue.take(np.flatnonzero(np.asarray(catalogue.labels) < N_SEEN))
    drawn = drawn_labels(seen, most, seed=4)
    _, counts = np.unique(drawn.labels, return_counts=True)
    assert (len(counts), set(counts)) == (expected, {N_IMAGES} if expected else set())
    assert evidence.MAX_BESIDE >= 10_000


def test_few_labels_are_evidence_in_one_gallery(catalogue: Catalogue, points: np.ndarray, tmp_path: Path) -> None:
    """Labels 8 to 19: each is searched for among the images of both sides, and among those of seen labels."""
    task = task_beside_seen(catalogue, points, tmp_path, lost=1, adapt=False)
    known = evidence_on_all_labels(task)
    assert known is not None
    assert known.logits is None
    assert_lists(known.lists, task.embeddings.numpy())
    assert np.array_equal(known.queries.numpy(), np.flatnonzero(task.catalogue.labels >= 0))
    assert set(known.n_relevant[known.queries].tolist()) == {N_IMAGES - 1}


def test_evidence_in_one_gallery_leaves_out_a_photos_own_sequence(points: np.ndarray, tmp_path: Path) -> None:
    """Two photos of each label were taken in one pass."""
    labels, number = np.arange(60) % 12, np.arange(60) // 12
    ids = [f"{item:03d}" for item in range(60)]
    passes = [
        f"pass-{label}" if n < 2 else f"alone-{item}"
        for item, (label, n) in enumerate(zip(labels, number, strict=True))
    ]
    table = pd.DataFrame({"id": ids, "label": labels.astype(str), "path": ids, "split": "train", "is_query": True})
    images = Catalogue(table.assign(is_gallery=True, sequence=passes), "planted.csv").as_query_and_gallery()
    task = make_task(
        images, Embeddings(images.ids, points[:60]), TOKENS, replace(SMALL, n_items=59, adapt=False), tmp_path
    )
    known = evidence_on_all_labels(task)
    assert known is not None
    for item in range(60):
        found = set(known.lists.items[item].tolist()) - {-1}
        assert found == {other for other in range(60) if passes[other] != passes[item]}
        assert known.n_relevant[item] == sum(labels[other] == labels[item] for other in found)


def planted_task(n_labels: int, folder: Path, **changes: float | str) -> TrainingTask:
    """Labels of four points each, around centres."""
    state, labels = np.random.default_rng(1), np.repeat(np.arange(n_labels), 4)
    ids = [f"{item:03d}" for item in range(len(labels))]
    table = pd.DataFrame({"id": ids, "label": labels.astype(str), "path": ids, "split": "train", "is_query": True})
    images = Catalogue(table.assign(is_gallery=True), "planted.csv").as_query_and_gallery()
    points = state.standard_normal((n_labels, 6))[labels] + state.standard_normal((len(labels), 6))
    config = replace(SMALL, n_items=20, top_n=20, adapt=False, **changes)  # pyright: ignore[reportArgumentType]
    return make_task(images, Embeddings(images.ids, points.astype(np.float32)), TOKENS, config, folder)


def test_a_model_that_is_trained_once_leaves_all_labels_to_steps_without_one(tmp_path: Path) -> None:
    task = planted_task(30, tmp_path, backbone_lr=1e-4)
    (run,) = task.runs
    assert run.validation is not None
    known = evidence_on_all_labels(task)
    assert known is not None
    assert known.logits is None
    assert np.array_equal(known.queries.numpy(), np.arange(120))
    assert set(known.n_relevant.tolist()) == {3}
    either = [lists.query_items for lists in (run.anchors, run.validation)]
    assert sorted(torch.cat(either).tolist()) == list(range(120))
    for items in either:  # either side was searched among itself
        assert_lists(known.lists[items], task.embeddings.numpy())
        expected = exact_lists(items.numpy(), task.embeddings.numpy())
        assert np.array_equal(known.lists.items[items].numpy(), expected)


def test_variants_of_one_product_are_set_aside_together(tmp_path: Path) -> None:
    """Ten products of four variants each: the lists of either half hold all variants of its products."""
    state, labels = np.random.default_rng(2), np.repeat(np.arange(40), 4)
    ids = [f"{item:03d}" for item in range(len(labels))]
    table = pd.DataFrame({"id": ids, "label": labels.astype(str), "path": ids, "split": "train", "is_query": True})
    images = Catalogue(table.assign(is_gallery=True), "planted.csv").as_query_and_gallery()
    label = images.labels.astype(np.int64)
    product = state.permutation(40) % 10
    variant = state.standard_normal((10, 6))[product] * 9 + state.standard_normal((40, 6))
    points = variant[label] + state.standard_normal((len(label), 6))
    config = replace(SMALL, n_items=20, top_n=20, adapt=False)
    task = make_task(images, Embeddings(images.ids, points.astype(np.float32)), TOKENS, config, tmp_path)
    halves = [set(product[label[run.anchors.query_items.numpy()]]) for run in task.runs[:2]]
    assert [len(half) for half in halves] == [5, 5]
    assert halves[0] | halves[1] == set(range(10))
    assert task.families is not None
    groups = [np.flatnonzero(task.families == family) for family in np.unique(task.families)]
    assert all(len(set(product[group])) == 1 for group in groups)
    known = evidence_of(task, join_lists([run.anchors for run in task.runs[:2]]), None)
    assert np.array_equal(known.query_families().numpy(), task.families[label])


def test_labels_of_an_extractor_are_drawn_one_by_one(tmp_path: Path) -> None:
    """It learns more from some variants of every product than from all variants of some."""
    task = planted_task(30, tmp_path, backbone_lr=1e-4)
    batches = planted_task(30, tmp_path / "batches", backbone_lr=1e-4, mining="whole_batch", loss="bce")
    labels = task.catalogue.labels.astype(np.int64)
    assert task.families is not None
    assert batches.families is None
    for each, families in ((task, task.families), (batches, None)):
        (run,) = each.runs
        assert run.validation is not None
        expected = sides(labels, SMALL.set_aside, SMALL.seed, families)
        assert np.array_equal(run.validation.query_items.numpy(), np.flatnonzero(expected == 1))


def test_evidence_on_all_labels_is_none_where_validation_shows_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves of many labels are validation in turn; few that an adapter was fitted to are not searched together."""
    assert evidence_on_all_labels(planted_task(30, tmp_path / "halves")) is None
    few = planted_task(12, tmp_path / "few")
    adapted = replace(few, start=Chain((AdaptStep("whiten", 0.0),)))
    assert (evidence_on_all_labels(few) is None, evidence_on_all_labels(adapted) is None) == (False, True)
    for most, is_enough in ((len(few.catalogue), False), (len(few.catalogue) - 1, True)):
        monkeypatch.setattr(evidence, "MANY_IMAGES", most)
        assert (evidence_on_all_labels(few) is None) is is_enough


def test_evidence_on_all_labels_leaves_out_tasks_beside_seen_labels(
    catalogue: Catalogue, points: np.ndarray, tmp_path: Path
) -> None:
    """Lists of what is trained on have none for the images beside them, so neighbourhoods cannot be made."""
    task = task_beside_seen(catalogue, points, tmp_path, lost=1, adapt=False)
    adapted = replace(task, half=None, runs=task.runs[:1], start=Chain((AdaptStep("whiten", 0.0),)))
    assert evidence_on_all_labels(adapted) is None
