"""Alpha query expansion and database augmentation against the formula written out row by row."""

import numpy as np
import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.query_expansion import expand_embeddings, expanded_distances


def literal(x: np.ndarray, gallery: np.ndarray, neighbours: list[int], alpha: float) -> np.ndarray:
    own = x / np.linalg.norm(x)
    total = own.copy()
    for j in neighbours:
        near = gallery[j] / np.linalg.norm(gallery[j])
        if j >= 0 and own @ near > 0:
            total += (own @ near) ** alpha * near
    return total / np.linalg.norm(total)


def make_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = torch.randn(30, 8, generator=generator), torch.randn(50, 8, generator=generator)
    neighbours = torch.randint(0, 50, (30, 12), generator=generator)
    neighbours[5, 3:] = -1
    neighbours[6] = -1
    return queries, gallery, neighbours


@pytest.mark.parametrize(("alpha", "n_neighbours"), [(3.0, 10), (0.0, 5), (1.5, 12), (3.0, 0)])
def test_expand_embeddings_equals_literal_definition(alpha: float, n_neighbours: int) -> None:
    queries, gallery, neighbours = make_inputs(0)
    found = expand_embeddings(queries, gallery, neighbours, n_neighbours=n_neighbours, alpha=alpha)
    for q in range(30):
        used = [j for j in neighbours[q, :n_neighbours].tolist() if j >= 0]
        wanted = literal(queries[q].double().numpy(), gallery.double().numpy(), used, alpha)
        np.testing.assert_allclose(found[q].numpy(), wanted, atol=1e-6)


def test_expand_embeddings_any_blocks_give_the_same_bits() -> None:
    queries, gallery, neighbours = make_inputs(1)
    whole = expand_embeddings(queries, gallery, neighbours, n_neighbours=10, alpha=3.0)
    for size in (1, 4, 29):
        parts = [
            expand_embeddings(q, gallery, n, n_neighbours=10, alpha=3.0)
            for q, n in zip(queries.split(size), neighbours.split(size), strict=True)
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_expand_embeddings_of_the_gallery_itself_draws_labels_together() -> None:
    state = np.random.RandomState(2)
    labels = torch.from_numpy(state.randint(0, 8, 200))
    x = torch.from_numpy((2 * state.randn(8, 6)[labels] + state.randn(200, 6)).astype(np.float32))

    def hit_rate(points: torch.Tensor) -> tuple[float, torch.Tensor]:
        unit = torch.nn.functional.normalize(points)
        near = torch.cdist(unit, unit).fill_diagonal_(torch.inf).argsort(dim=1)[:, :10]
        return (labels[near] == labels[:, None]).double().mean().item(), near

    before, near = hit_rate(x)
    after, _ = hit_rate(expand_embeddings(x, x, near, n_neighbours=10, alpha=3.0))
    assert after > before + 0.01


def test_expand_embeddings_bad_constants_are_refused() -> None:
    queries, gallery, neighbours = make_inputs(3)
    with pytest.raises(BadInput, match="n_neighbours=13"):
        expand_embeddings(queries, gallery, neighbours, n_neighbours=13, alpha=1.0)
    with pytest.raises(BadInput, match="alpha=-1"):
        expand_embeddings(queries, gallery, neighbours, n_neighbours=3, alpha=-1.0)


def test_expanded_distances_equal_the_definition_written_out() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 6, generator=generator)
    items = torch.stack([torch.randperm(40, generator=generator)[:9] for _ in range(40)])
    items[3, 5:] = -1
    weights = torch.rand(40, 9, generator=generator).double()
    unit = torch.nn.functional.normalize(x.double())
    kept = torch.where(items >= 0, weights.square(), 0.0)[:, :4]
    total = unit + sum(kept[:, [place]] * unit[items[:, place]] for place in range(4))
    expanded = torch.nn.functional.normalize(total)
    queries = torch.tensor([3, 0, 39])
    found = expanded_distances(x, items, weights, queries, k=4, alpha=2.0)
    for row, query in enumerate(queries.tolist()):
        for place, item in enumerate(items[query].tolist()):
            wanted = float("inf") if item < 0 else 1 - float(expanded[query] @ expanded[item])
            assert float(found[row, place]) == pytest.approx(wanted, abs=1e-6)
