"""k-reciprocal re-ranking on lists against the paper's dense definition on a full matrix."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import metrics, neighbourhood, ragged


def dense_k_reciprocal(
    dist: np.ndarray, rank: np.ndarray, k1: int, k2: int, weight: float, blend: np.ndarray
) -> np.ndarray:
    """Zhong et al. 2017 on an n x n matrix of scaled distances; `rank` has each item itself first."""
    n = len(dist)

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in rank[i, : k + 1] if i in rank[j, : k + 1]]

    v = np.zeros((n, n))
    for i in range(n):
        core = reciprocal(i, k1)
        expanded = set(core)
        for c in core:
            around = reciprocal(c, int(np.around(k1 / 2)))
            if len(set(around) & set(core)) > 2 / 3 * len(around):
                expanded |= set(around)
        members = sorted(expanded)
        w = np.exp(-dist[i, members])
        v[i, members] = w / w.sum()
    if k2 != 1:
        v = np.stack([v[rank[i, :k2]].mean(axis=0) for i in range(n)])
    overlap = np.array([[np.minimum(v[i], v[j]).sum() for j in range(n)] for i in range(n)])
    return (1 - overlap / (2 - overlap)) * (1 - weight) + blend * weight


def make_lists(n: int, k: int, seed: int, n_labels: int = 6) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Clustered points: their full float64 distance matrix and the lists of the k nearest, self left out."""
    state = np.random.RandomState(seed)
    x = state.randn(n_labels, 5)[state.randint(0, n_labels, n)] + 0.6 * state.randn(n, 5)
    dist = np.linalg.norm(x[:, None] - x[None], axis=2).astype(np.float32)
    np.fill_diagonal(dist, np.inf)
    order = np.argsort(dist, axis=1, kind="stable")[:, :k]
    lists = torch.from_numpy(order), torch.from_numpy(np.take_along_axis(dist, order, axis=1))
    np.fill_diagonal(dist, 0)
    return dist.astype(np.float64), *lists


def with_self(items: torch.Tensor) -> np.ndarray:
    return np.concatenate([np.arange(len(items))[:, None], items.numpy()], axis=1)


def new_distances(items: torch.Tensor, distances: torch.Tensor, **constants: float) -> np.ndarray:
    """n x n, NaN for pairs outside the lists."""
    ordered, values = neighbourhood.k_reciprocal(items, distances, **constants)
    found = np.full((len(items), len(items)), np.nan)
    np.put_along_axis(found, ordered.numpy(), values.double().numpy(), axis=1)
    return found


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (10, 3, 0.5), (7, 1, 0.0), (1, 2, 0.3), (5, 6, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_k_reciprocal_full_lists_equal_the_dense_definition(k1: int, k2: int, weight: float, seed: int) -> None:
    dist, items, distances = make_lists(70, 69, seed)
    scaled = dist / 2.5
    wanted = dense_k_reciprocal(scaled, with_self(items), k1, k2, weight, scaled)
    found = new_distances(items, distances, k1=k1, k2=k2, original_weight=weight, scale=2.5)
    is_other = ~np.eye(70, dtype=bool)
    np.testing.assert_allclose(found[is_other], wanted[is_other], atol=1e-6)


@pytest.mark.parametrize("k", [12, 20])
def test_k_reciprocal_short_lists_equal_the_dense_definition_cut_at_their_ends(k: int) -> None:
    dist, items, distances = make_lists(90, k, seed=3)
    cut = np.minimum(dist, distances[:, -1:].double().numpy())
    wanted = dense_k_reciprocal(cut / 1.5, with_self(items), 12, 4, 0.3, dist / 1.5)
    found = new_distances(items, distances, k1=12, k2=4, original_weight=0.3, scale=1.5)
    is_listed = ~np.isnan(found)
    assert is_listed.sum() == 90 * k
    np.testing.assert_allclose(found[is_listed], wanted[is_listed], atol=1e-6)


def test_encoding_rows_sum_to_one_and_reach_beyond_the_own_list() -> None:
    _, items, distances = make_lists(90, 12, seed=3)
    block = torch.arange(90)
    encoding = neighbourhood.encode_k_reciprocal(items, distances, block, k1=12, scale=1.0)
    rows = encoding.offsets.diff()
    sums = torch.zeros(90).double().index_add_(0, block.repeat_interleave(rows), encoding.weights)
    torch.testing.assert_close(sums, torch.ones(90).double())
    assert int(rows.max()) > 13


@pytest.mark.parametrize("size", [1, 7, 130, 300])
def test_steps_any_blocks_give_the_same_bits(size: int) -> None:
    _, items, distances = make_lists(300, 25, seed=4)
    everything = torch.arange(300)
    scale = neighbourhood.distance_scale(distances)

    def chain(size: int) -> list[torch.Tensor]:
        blocks = everything.split(size)
        encoding = ragged.concatenate(
            [neighbourhood.encode_k_reciprocal(items, distances, b, k1=20, scale=scale) for b in blocks]
        )
        wide = ragged.concatenate([neighbourhood.expand_encoding(encoding, items, b, k2=6) for b in blocks])
        jaccard = torch.cat([neighbourhood.jaccard_distances(wide, b, items[b]) for b in blocks])
        return [encoding.columns, encoding.weights, wide.columns, wide.weights, jaccard]

    assert all(torch.equal(one, other) for one, other in zip(chain(300), chain(size), strict=True))
    blended = neighbourhood.blend(chain(size)[-1], distances, original_weight=0.3, scale=scale)
    ordered, values = neighbourhood.reorder(items, blended)
    whole = neighbourhood.k_reciprocal(items, distances, k1=20, k2=6, original_weight=0.3)
    assert torch.equal(ordered, whole[0])
    assert torch.equal(values, whole[1])


def test_jaccard_distances_of_other_candidates_equal_those_of_the_lists() -> None:
    _, items, distances = make_lists(60, 20, seed=5)
    everything = torch.arange(60)
    encoding = neighbourhood.encode_k_reciprocal(items, distances, everything, k1=10, scale=1.0)
    whole = neighbourhood.jaccard_distances(encoding, everything, everything.expand(60, 60).contiguous())
    queries = torch.tensor([3, 58, 3])
    candidates = torch.tensor([[3, 9, -1], [0, -1, 59], [-1, -1, -1]])
    found = neighbourhood.jaccard_distances(encoding, queries, candidates)
    wanted = torch.where(candidates >= 0, whole[queries[:, None], candidates.clamp(min=0)], torch.inf)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(whole, whole.T)
    torch.testing.assert_close(whole.diagonal(), torch.zeros(60), atol=1e-6, rtol=0)


def test_k_reciprocal_ragged_lists_keep_their_items_and_missing_places_last() -> None:
    _, items, distances = make_lists(40, 15, seed=6)
    lengths = torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(0))
    is_there = torch.arange(15) < lengths[:, None]
    items, distances = torch.where(is_there, items, -1), torch.where(is_there, distances, torch.inf)
    before = items.clone(), distances.clone()
    ordered, values = neighbourhood.k_reciprocal(items, distances, k1=8, k2=3)
    assert torch.equal(items, before[0])
    assert torch.equal(distances, before[1])
    assert torch.equal(ordered.sort(dim=1).values, items.sort(dim=1).values)
    assert torch.equal(ordered >= 0, is_there)
    assert torch.equal(values.isfinite(), is_there)
    assert bool((values[:, 1:] >= values[:, :-1])[is_there[:, 1:]].all())


def test_k_reciprocal_weight_one_is_the_original_order() -> None:
    _, items, distances = make_lists(50, 20, seed=7)
    ordered, values = neighbourhood.k_reciprocal(items, distances, k1=10, k2=3, original_weight=1.0, scale=2.0)
    assert torch.equal(ordered, items)
    torch.testing.assert_close(values, distances / 2)


def test_k_reciprocal_clustered_points_improves_map() -> None:
    state = np.random.RandomState(8)
    labels = torch.from_numpy(state.randint(0, 10, 300))
    x = torch.from_numpy(2 * state.randn(10, 6)[labels] + 1.2 * state.randn(300, 6))
    dist = torch.cdist(x, x).fill_diagonal_(torch.inf).float().sort(dim=1, stable=True)
    items, distances = dist.indices[:, :60], dist.values[:, :60]
    everything = torch.arange(300)
    n_relevant = metrics.count_relevant(everything, labels, None, everything, labels, None)

    def score(lists: torch.Tensor) -> float:
        return metrics.means(metrics.per_query(metrics.relevance(lists, labels, labels), n_relevant))["map@10"]

    assert score(neighbourhood.k_reciprocal(items, distances)[0]) > score(items) + 0.01


def test_reorder_ties_go_to_the_smaller_item_and_missing_ones_last() -> None:
    items = torch.tensor([[7, 2, -1, 5, 4]])
    distances = torch.tensor([[0.5, 0.5, 0.1, torch.inf, 0.2]])
    ordered, values = neighbourhood.reorder(items, distances)
    assert ordered.tolist() == [[4, 2, 7, 5, -1]]
    assert values.tolist() == [[pytest.approx(0.2), 0.5, 0.5, torch.inf, torch.inf]]


def test_distance_scale_is_the_median_list_end_and_ignores_empty_lists() -> None:
    inf = torch.inf
    distances = torch.tensor([[0.5, 1.0], [0.1, inf], [inf, inf], [1.0, 90.0]])
    assert neighbourhood.distance_scale(distances) == 1.0
    assert neighbourhood.distance_scale(torch.full((2, 2), inf)) == 1.0
    assert neighbourhood.distance_scale(torch.zeros(0, 3)) == 1.0


def test_steps_bad_constants_are_refused() -> None:
    _, items, distances = make_lists(10, 5, seed=9)
    for constants, name in (({"k1": 6}, "k1=6"), ({"k1": 0}, "k1=0"), ({"k1": 3, "k2": 7}, "k2=7")):
        with pytest.raises(BadInput, match=name):
            neighbourhood.k_reciprocal(items, distances, **constants)
    with pytest.raises(BadInput, match="original_weight=2"):
        neighbourhood.k_reciprocal(items, distances, k1=3, k2=2, original_weight=2.0)
    with pytest.raises(BadInput, match="negative distances"):
        neighbourhood.k_reciprocal(items, distances - 9, k1=3, k2=2)
    with pytest.raises(BadInput, match="scale="):
        neighbourhood.encode_k_reciprocal(items, distances, torch.arange(10), k1=3, scale=0.0)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time on one thread, which other processes of the machine do not lengthen much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        work()
        return time.process_time() - started
    finally:
        torch.set_num_threads(threads)


def test_k_reciprocal_five_thousand_items_take_seconds() -> None:
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(10))
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(50, largest=False)
    assert cpu_seconds(lambda: neighbourhood.k_reciprocal(*nearest[::-1], k1=20, k2=6)) < 10
