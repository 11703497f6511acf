"""The plan: a pure function of seed and epoch, whose shares are the whole for any number of workers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_examples import SMALL

from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.training.plan import (
    TrainingStep,
    plan_batches,
    plan_digest,
    plan_lists,
    seed_of,
    share_of,
)


def draw(n_labels: int = 6, n_images: int = 5) -> tuple[CandidateLists, np.ndarray, torch.Tensor]:
    """Candidate lists of random points in which images of a label lie near each other."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n_labels).repeat_interleave(n_images)
    embeddings = torch.randn(n_labels, 8, generator=generator)[labels] + torch.randn(
        len(labels), 8, generator=generator
    )
    items = torch.arange(len(labels))
    found = nearest(embeddings, embeddings, query_items=items, gallery_items=items, n_items=12)
    return found, labels.numpy(), embeddings


def pairs_of(step: TrainingStep) -> list[tuple[int, int, bool, float]]:
    columns = (step.query_items, step.gallery_items, step.is_negative, step.first_stage_distance)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("is_by_list", [False, True])
@pytest.mark.parametrize("n_shares", [1, 2, 3, 4, 5, 8, 13])
def test_shares_of_a_step_are_the_step_in_order(n_shares: int, is_by_list: bool) -> None:
    lists, labels, embeddings = draw()
    config = replace(SMALL, lists_per_step=7)
    for step in plan_lists(lists, labels, labels * 0 - 1, embeddings, config, 0):
        shares = [share_of(step, number, n_shares, is_by_list) for number in range(n_shares)]
        assert [pair for share in shares for pair in pairs_of(share)] == pairs_of(step)
        if is_by_list:
            assert sum(share.n_lists() for share in shares) == step.n_lists()
            sizes = {len(share) // max(1, share.n_lists()) for share in shares if len(share)}
            assert sizes == {len(step) // step.n_lists()}, "a list was cut"


def test_plan_of_lists_repeats_for_the_same_seed_and_epoch_and_differs_for_others() -> None:
    lists, labels, embeddings = draw()
    no_sequences = labels * 0 - 1

    def digest(seed: int, epoch: int) -> str:
        return plan_digest(plan_lists(lists, labels, no_sequences, embeddings, replace(SMALL, seed=seed), epoch))

    assert digest(1, 2) == digest(1, 2)
    assert len({digest(1, 2), digest(1, 3), digest(2, 2)}) == 3


def test_plan_of_lists_takes_positives_of_the_label_and_negatives_of_the_own_list() -> None:
    lists, labels, embeddings = draw()
    steps = plan_lists(lists, labels, labels * 0 - 1, embeddings, SMALL, 0)
    anchors = []
    for step in steps:
        assert torch.equal(step.is_negative, torch.from_numpy(labels[step.query_items] != labels[step.gallery_items]))
        assert bool((step.query_items != step.gallery_items).all())
        expected = (embeddings[step.query_items] - embeddings[step.gallery_items]).norm(dim=1)
        torch.testing.assert_close(step.first_stage_distance, expected)
        for query, item, is_negative, _ in pairs_of(step):
            assert not is_negative or item in lists.items[query]
        anchors += step.query_items[~step.is_negative].tolist()
    assert len(set(anchors)) == len(anchors) > 20


def test_plan_of_lists_gives_as_many_steps_as_asked_for() -> None:
    lists, labels, embeddings = draw()
    config = replace(SMALL, steps_per_epoch=11, lists_per_step=8)
    steps = plan_lists(lists, labels, labels * 0 - 1, embeddings, config, 0)
    assert [step.n_lists() for step in steps] == [8] * 11


def test_plan_of_batches_pairs_only_the_items_given_and_has_both_kinds() -> None:
    _, labels, embeddings = draw()
    items = np.flatnonzero(labels != 2)
    config = replace(SMALL, mining="batch", loss="bce", n_labels=3, n_instances=3)
    steps = plan_batches(items, labels, embeddings, config, 0)
    assert len(steps) == 5 // 3
    for step in steps:
        assert 2 not in labels[step.query_items.numpy()]
        assert step.is_negative.any()
        assert not step.is_negative.all()
        assert bool((step.list_of_pair.diff() >= 0).all())


def test_seeds_of_different_tuples_differ() -> None:
    seeds = {seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
