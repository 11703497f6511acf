import numpy as np
import pytest

from distributed_rerank.data.samplers import BalanceSampler
from distributed_rerank.errors import BadInput


def _labels(counts: list[int], seed: int = 0) -> np.ndarray:
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return np.random.default_rng(seed).permutation(labels)


@pytest.mark.parametrize(("n_labels", "n_instances"), [(2, 2), (3, 4), (7, 5), (5, 3)])
def test_batches_follow_oml_definition(n_labels: int, n_instances: int) -> None:
    labels = _labels([2, 9, 3, 4, 12, 5, 2])
    sampler = BalanceSampler(labels, n_labels, n_instances, seed=4)
    for epoch in range(5):
        batches = sampler.batches(epoch)
        assert len(batches) == sampler.n_batches == 7 // n_labels
        seen: list[int] = []
        for batch in batches:
            assert batch.dtype == np.int64
            assert batch.shape == (n_labels * n_instances,)
            names, counts = np.unique(labels[batch], return_counts=True)
            assert len(names) == n_labels
            assert (counts == n_instances).all()
            seen += names.tolist()
            for name in names:
                drawn = batch[labels[batch] == name]
                assert len(set(drawn)) == min(n_instances, (labels == name).sum())
        assert len(seen) == len(set(seen))


def test_plan_depends_on_seed_and_epoch_only() -> None:
    labels = _labels([4] * 20)
    plan = [batch.tolist() for batch in BalanceSampler(labels, 4, 3, seed=1).batches(2)]
    np.random.seed(7)
    sampler = BalanceSampler(labels, 4, 3, seed=1)
    others = [[batch.tolist() for batch in sampler.batches(epoch)] for epoch in (0, 1, 3)]
    assert [batch.tolist() for batch in sampler.batches(2)] == plan
    assert plan not in others
    assert plan != [batch.tolist() for batch in BalanceSampler(labels, 4, 3, seed=2).batches(2)]
    assert np.random.get_state()[1][0] == 7  # type: ignore[index]


def test_every_item_is_drawn_in_the_long_run_and_unlabelled_ones_never() -> None:
    labels = _labels([3, 5, 4, 6])
    labels[:2] = -1
    sampler = BalanceSampler(labels, 2, 2)
    drawn = np.concatenate([batch for epoch in range(60) for batch in sampler.batches(epoch)])
    assert set(drawn.tolist()) == set(np.flatnonzero(labels >= 0).tolist())


def test_labels_with_gaps_in_their_codes_are_fine() -> None:
    labels = np.array([5, 900, 5, 900, 17, 17], np.int64)
    batch = BalanceSampler(labels, 3, 2).batches(0)[0]
    assert sorted(batch.tolist()) == [0, 1, 2, 3, 4, 5]


def test_batch_holds_all_labels_where_there_are_fewer_and_never_one_of_a_single_item() -> None:
    labels = _labels([3, 1, 2, 5, 1])
    sampler = BalanceSampler(labels, 30, 2)
    for epoch in range(9):
        (batch,) = sampler.batches(epoch)
        assert np.unique(labels[batch], return_counts=True)[0].tolist() == [0, 2, 3]
        assert len(set(batch.tolist())) == 6


@pytest.mark.parametrize(
    ("counts", "n_labels", "n_instances", "expected"),
    [
        ([2, 2], 1, 2, "n_labels=1 gives no negative"),
        ([2, 2], 2, 1, "n_instances=1 gives no positive"),
        ([1, 1, 2], 2, 2, "1 labels of the training images have two items"),
        ([], 2, 2, "0 labels of the training images"),
    ],
)
def test_impossible_plans_name_value_and_fix(counts: list[int], n_labels: int, n_instances: int, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        BalanceSampler(_labels(counts), n_labels, n_instances)
