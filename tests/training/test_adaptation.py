"""The first chain step: taken where it helps labels that it was not fitted to, left out where it does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from training_examples import SMALL, TOKENS

from distributed_rerank.chain.chain import AdaptStep, Chain
from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.chain.trials import try_chain
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.models.adapter import fit_adapters
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.metrics import count_relevant
from distributed_rerank.training.adaptation import TRIED, Adaptation, choose_adaptation
from distributed_rerank.training.evidence import evidence_of
from distributed_rerank.training.stage import choose_chain, make_task
from distributed_rerank.training.task import TrainingTask, validation_lists

N_LABELS, N_IMAGES, DIM = 40, 5, 16
FEW = 10
SIDE = np.repeat(np.arange(N_LABELS) % 2, N_IMAGES)
LABELS = np.repeat(np.arange(N_LABELS), N_IMAGES)


def planted(nuisance: float, seed: int) -> np.ndarray:
    """Points of labels that differ in the first half of the directions and scatter in the second."""
    state = np.random.default_rng(seed)
    centres = np.c_[state.standard_normal((N_LABELS, DIM // 2)), np.zeros((N_LABELS, DIM // 2))]
    scatter = np.r_[np.full(DIM // 2, 0.3), np.full(DIM // 2, nuisance)]
    return (centres[LABELS] + state.standard_normal((len(LABELS), DIM)) * scatter).astype(np.float32)


def search(matrix: np.ndarray, name: str) -> tuple[CandidateLists, CandidateLists]:
    x = torch.from_numpy(matrix)
    first, second = (torch.from_numpy(np.flatnonzero(SIDE == side)) for side in (0, 1))
    return (
        nearest(x[first], x[first], query_items=first, gallery_items=first, n_items=20),
        nearest(x[second], x[second], query_items=second, gallery_items=second, n_items=20),
    )


def chosen(points: np.ndarray, labels: np.ndarray, seed: int = 0) -> Adaptation:
    def measure(lists: tuple[CandidateLists, CandidateLists]) -> Evidence:
        joined = concatenate(list(lists))
        joined = joined[joined.query_items.argsort()]
        items, known = joined.query_items, torch.from_numpy(labels)
        return Evidence(joined, known, count_relevant(items, known, None, items, known, None))

    return choose_adaptation(points, labels, np.full(len(labels), -1), SIDE, search, measure, seed)


def test_a_map_that_helps_other_labels_is_taken_and_cross_fitted() -> None:
    points = planted(nuisance=1.5, seed=0)
    found = chosen(points, LABELS)
    assert found.step is not None
    assert found.step.kind != "centre"
    assert found.decision is not None
    assert found.decision["gain"]["map@10"]["ci95"][0] > 0.1
    place = TRIED.index((found.step.kind, found.step.floor))
    for side in (0, 1):
        other = torch.from_numpy(SIDE != side)
        fitted = fit_adapters(torch.from_numpy(points)[other], torch.from_numpy(LABELS)[other], TRIED)[place]
        assert fitted is not None
        assert np.array_equal(found.embeddings[SIDE == side], fitted(points[SIDE == side]))
    whole = fit_adapters(torch.from_numpy(points), torch.from_numpy(LABELS), TRIED)[place]
    assert whole is not None
    assert found.adapter is not None
    assert found.adapter.digest() == whole.digest()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_mapped_for_shuffled_labels_or_a_perfect_first_stage(seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(LABELS[SIDE == 0])
    labels = LABELS.copy()
    labels[SIDE == 0] = shuffled
    labels[SIDE == 1] = np.random.default_rng(seed + 9).permutation(LABELS[SIDE == 1])
    for points, known in ((planted(1.5, seed), labels), (planted(0.01, seed) * 100, LABELS)):
        found = chosen(points, known, seed)
        if found.step is None:
            assert found.embeddings is points
        else:  # what is taken by chance may not do harm
            assert found.decision is not None
            assert found.decision["gain"]["map@10"]["mean"] >= 0
    assert chosen(planted(0.01, seed) * 100, LABELS, seed).step is None


def test_few_labels_are_chosen_on_by_folds_and_map_new_labels_better() -> None:
    points = planted(nuisance=1.5, seed=0)
    labels = np.where(LABELS < FEW, LABELS, -1)
    side = np.where(labels < 0, -1, SIDE)

    def search_few(matrix: np.ndarray, name: str) -> tuple[CandidateLists, CandidateLists]:
        x = torch.from_numpy(matrix)
        first, second = (torch.from_numpy(np.flatnonzero(side == s)) for s in (0, 1))
        return (
            nearest(x[first], x[first], query_items=first, gallery_items=first, n_items=20),
            nearest(x[second], x[second], query_items=second, gallery_items=second, n_items=20),
        )

    seen = []

    def measure(lists: tuple[CandidateLists, CandidateLists]) -> Evidence:
        joined = lists[0][lists[0].query_items.argsort()]
        seen.append(joined)
        items, known = joined.query_items, torch.from_numpy(labels)
        return Evidence(joined, known[items], count_relevant(items, known[items], None, items, known[items], None))

    found = choose_adaptation(points, labels, np.full(len(labels), -1), side, search_few, measure, 0)
    assert found.step is not None
    assert found.adapter is not None
    assert found.decision is not None
    assert found.decision["n_labels"] == FEW
    assert len(seen) == 2
    # An item's list is the one under an adapter that has not seen its label, whatever the folds are.
    for lists in seen:
        assert lists.query_items.tolist() == list(range(FEW * N_IMAGES))
        assert bool((lists.items < FEW * N_IMAGES).all())
    fresh = torch.from_numpy(points[labels < 0])
    mapped = torch.from_numpy(found.adapter(fresh.numpy()))
    items, known = torch.arange(len(fresh)), torch.from_numpy(LABELS[labels < 0])
    right = []
    for x in (fresh, mapped):
        lists = nearest(x, x, query_items=items, gallery_items=items, n_items=1)
        right.append(float((known[lists.items[:, 0]] == known).double().mean()))
    assert right[1] > right[0] + 0.1


def task_with(nuisance: float, accept: float, folder: Path) -> TrainingTask:
    """A task over planted embeddings, whose images need not exist."""
    ids = [f"{number:03d}" for number in range(len(LABELS))]
    table = pd.DataFrame({"id": ids, "label": LABELS.astype(str), "path": ids, "split": "train", "is_query": True})
    images = Catalogue(table.assign(is_gallery=True), "planted.csv").as_query_and_gallery()
    embeddings = Embeddings(images.ids, planted(nuisance, 0))
    return make_task(images, embeddings, TOKENS, replace(SMALL, n_items=20, top_n=20, accept=accept), folder)


def states_of(task: TrainingTask, noise: float) -> list[dict[str, Any]]:
    """What a training leaves of its runs, with logits that tell the truth but for this noise."""
    generator, labels = torch.Generator().manual_seed(0), torch.from_numpy(task.catalogue.labels.astype(np.int64))
    states = []
    for run in task.runs:
        logits = None
        if run.validation is not None:
            is_wrong = labels[run.validation.items] != labels[run.validation.query_items][:, None]
            logits = is_wrong.float() + noise * torch.randn(is_wrong.shape, generator=generator)
        states.append({"best": {"logits": logits}})
    return states


@pytest.mark.parametrize(("accept", "is_taken"), [(0.9999, True), (0.9999999, False)])
def test_an_adapter_that_is_only_likely_is_taken_with_the_steps_behind_it(
    tmp_path: Path, accept: float, is_taken: bool
) -> None:
    task = task_with(0.65, accept, tmp_path)
    plain, decision = task.unadapted, task.start.chosen_on["adapt"]
    assert plain is not None
    assert (decision["taken"], decision["as_one"], 0.9 < decision["probability"] < accept) == (False, True, True)
    assert len(task.start.steps) == 1
    assert plain.start.steps == ()
    assert np.array_equal(plain.embeddings.numpy(), planted(0.65, 0))
    chain = choose_chain(task, states_of(task, 0.5))
    assert chain.is_judged_as_one == is_taken
    assert (chain.adapter is not None) == is_taken
    assert chain.chosen_on["adapt"] == decision | {"taken": is_taken}
    assert any(isinstance(step, AdaptStep) for step in chain.steps) == is_taken
    # The figures of the first stage are those of the lists that the chain stands behind.
    behind = task if is_taken else plain
    figures = try_chain(evidence_of(behind, validation_lists(behind), None), Chain()).figures()
    assert chain.chosen_on["first_stage"] == figures
