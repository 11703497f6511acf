"""Neighbourhoods weighed by probabilities against their definition on dense matrices."""

import numpy as np
import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.match_neighbourhood import Kind, encode_matches, mix, overlap_distances, reorder_stably


def make_lists(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of clustered points, self left out, with probabilities that fall along each list."""
    state = np.random.RandomState(seed)
    x = state.randn(6, 5)[state.randint(0, 6, n)] + 0.6 * state.randn(n, 5)
    dist = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(dist, np.inf)
    order = np.argsort(dist, axis=1, kind="stable")[:, :k]
    skew = np.exp(0.3 * state.randn(n, 1))  # p(i, j) and p(j, i) differ
    probabilities = 1 / (1 + np.exp(4 * np.take_along_axis(dist, order, axis=1) * skew - 5))
    return torch.from_numpy(order), torch.from_numpy(probabilities)


def dense_overlap(items: torch.Tensor, p: torch.Tensor, kind: Kind, k1: int, k2: int) -> np.ndarray:
    """Jaccard distance of all pairs from n x n matrices."""
    n = len(items)
    given = torch.zeros(n, n).double().scatter_(1, items, p)

    def near(k: int) -> torch.Tensor:
        return torch.zeros(n, n, dtype=torch.bool).scatter_(1, items[:, :k], True).fill_diagonal_(True)

    if kind == "direct":
        w = given * near(k1)
    else:
        core = near(k1) & near(k1).T
        half = near(round(k1 / 2))
        half = half & half.T
        members = core.clone()
        for i in range(n):
            for c in core[i].nonzero().flatten().tolist():
                if 3 * int((half[c] & core[i]).sum()) > 2 * int(half[c].sum()):
                    members[i] |= half[c]
        w = torch.maximum(given, given.T) * members
    w.fill_diagonal_(1)
    v = w / w.sum(dim=1, keepdim=True)
    with_self = torch.cat([torch.arange(n)[:, None], items], dim=1)
    v = torch.stack([v[with_self[i, :k2]].mean(dim=0) for i in range(n)])
    overlap = torch.minimum(v[:, None], v[None]).sum(dim=2)
    return (1 - overlap / (2 - overlap)).numpy()


@pytest.mark.parametrize("kind", ["reciprocal", "direct"])
@pytest.mark.parametrize(("k1", "k2", "k"), [(20, 6, 69), (10, 3, 15), (7, 1, 7), (1, 2, 12)])
def test_overlap_distances_equal_the_dense_definition(kind: Kind, k1: int, k2: int, k: int) -> None:
    items, p = make_lists(70, k, seed=k1)
    wanted = np.take_along_axis(dense_overlap(items, p, kind, k1, k2), items.numpy(), axis=1)
    queries = torch.tensor([4, 60, 0, 33])
    found = overlap_distances(items, p, queries, kind=kind, k1=k1, k2=k2)
    np.testing.assert_allclose(found.numpy(), wanted[queries.numpy()], atol=1e-6)


@pytest.mark.parametrize("kind", ["reciprocal", "direct"])
def test_encode_matches_blocks_give_the_same_bits_and_rows_sum_to_one(kind: Kind) -> None:
    items, p = make_lists(300, 25, seed=4)
    items[7, 3:], p[7, 3:] = -1, 0
    everything = torch.arange(300)
    whole = encode_matches(items, p, everything, kind=kind, k1=20)
    sums = torch.zeros(300).double().index_add_(0, everything.repeat_interleave(whole.offsets.diff()), whole.weights)
    torch.testing.assert_close(sums, torch.ones(300).double())
    parts = [encode_matches(items, p, rows, kind=kind, k1=20) for rows in everything.split(7)]
    assert torch.equal(whole.columns, torch.cat([part.columns for part in parts]))
    assert torch.equal(whole.weights, torch.cat([part.weights for part in parts]))


def test_overlap_of_an_item_without_candidates_is_missing() -> None:
    items, p = make_lists(40, 10, seed=1)
    items[5], p[5] = -1, 0
    found = overlap_distances(items, p, torch.arange(40), kind="reciprocal", k1=5, k2=2)
    assert torch.isinf(found[5]).all()
    assert torch.isfinite(found[torch.arange(40) != 5]).all()


def test_mix_and_reorder_keep_the_order_of_ties_and_the_missing_last() -> None:
    items = torch.tensor([[9, 4, 7, 2, -1]])
    overlap = torch.tensor([[1.0, 1.0, 0.0, 1.0, torch.inf]])
    p = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]]).double()
    found, distances = reorder_stably(items, mix(overlap, p, original_weight=0.4))
    assert found.tolist() == [[7, 2, 9, 4, -1]]
    assert distances.tolist()[0] == pytest.approx([0.2, 0.8, 1.0, 1.0, torch.inf])


def test_bad_constants_are_refused() -> None:
    items, p = make_lists(30, 5, seed=2)
    with pytest.raises(BadInput, match="k1=6"):
        overlap_distances(items, p, torch.arange(30), kind="direct", k1=6, k2=1)
    with pytest.raises(BadInput, match=r"original_weight=1\.5"):
        mix(torch.ones(1, 1), torch.ones(1, 1).double(), original_weight=1.5)


def test_pinned_candidates_keep_their_places_and_the_rest_is_sorted() -> None:
    generator = torch.Generator().manual_seed(0)
    items, distances = torch.arange(40).view(4, 10), torch.rand(4, 10, generator=generator)
    for pinned in (0, 1, 3, 10, 12):
        found, values = reorder_stably(items, distances, pinned)
        for row in range(4):
            kept, rest = items[row, :pinned].tolist(), items[row, pinned:].tolist()
            by_distance = sorted(rest, key=lambda item: (float(distances[row, item - 10 * row]), item))
            assert found[row].tolist() == kept + by_distance
        assert bool((values.diff(dim=1) >= 0).all())
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert reorder_stably(empty, torch.empty(2, 0), 1)[0].shape == (2, 0)
