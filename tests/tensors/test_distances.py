"""Exact distances against numpy in float64, and the promised error bound of the matrix form."""

import numpy as np
import pytest
import torch

from distributed_rerank.tensors.distances import (
    exact_distances,
    exact_pair_distances,
    relative_squared_error,
    relative_squared_tile,
    rounded_error,
    rounded_gallery,
    rounded_queries,
    squared_norms,
)
from distributed_rerank.tensors.hardware import bf16_support


def test_exact_distances_match_numpy_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 37, generator=generator), torch.randn(50, 37, generator=generator)
    expected = np.linalg.norm(left.numpy().astype(np.float64) - right.numpy(), axis=1)
    np.testing.assert_array_equal(exact_distances(left, right).numpy(), expected.astype(np.float32))


def test_exact_distances_equal_rows_are_zero_apart_even_far_from_the_origin() -> None:
    rows = torch.randn(9, 384, generator=torch.Generator().manual_seed(0)) * 3 + 1e4
    assert (exact_distances(rows, rows.clone()) == 0).all()


@pytest.mark.parametrize("dim", [1, 3, 16, 384, 1283])
def test_exact_pair_distances_do_not_depend_on_the_other_pairs(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    left, right = torch.randn(40, dim, generator=generator), torch.randn(60, dim, generator=generator)
    rows = torch.randint(0, 40, (1500,), generator=generator)
    columns = torch.randint(0, 60, (1500,), generator=generator)
    together = exact_pair_distances(left, right, rows, columns)
    alone = [exact_pair_distances(left, right, rows[i : i + 1], columns[i : i + 1]) for i in range(1500)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e15])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_relative_squared_tile_stays_within_its_error_bound(scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = (torch.randn(30, 96, generator=generator) + offset) * scale
    gallery = (torch.randn(400, 96, generator=generator) + offset) * scale
    tile = torch.empty(30, 400)
    relative_squared_tile(queries, gallery, squared_norms(gallery).float(), tile)
    true = gallery.double().square().sum(1) - 2 * queries.double() @ gallery.double().t()
    bound = relative_squared_error(squared_norms(queries), float(squared_norms(gallery).max().sqrt()), 96)
    assert ((tile.double() - true).abs() <= bound[:, None]).all()


@pytest.mark.skipif(bf16_support(torch.device("cpu")) is None, reason="no bf16 on this CPU")
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-22, 1e15])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dim", [3, 96, 1000])
def test_rounded_product_stays_within_its_error_bound(scale: float, offset: float, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = (torch.randn(30, dim, generator=generator) + offset) * scale
    gallery = (torch.randn(400, dim, generator=generator) + offset) * scale
    left, right = rounded_queries(queries), rounded_gallery(gallery, squared_norms(gallery).float(), 416)
    product = left.factors @ right.factors.t()
    assert product[:, 400:].isposinf().all()
    true = gallery.double().square().sum(1) - 2 * queries.double() @ gallery.double().t()
    bound = rounded_error(
        squared_norms(queries), float(squared_norms(gallery).max().sqrt()), dim,
        left.residuals, float(right.residuals.max()),
    )  # fmt: skip
    error = (product[:, :400].double() - true).abs()
    result_rounding = 2.0**-8 * (true.abs() + bound[:, None])
    assert (error <= bound[:, None] + result_rounding).all()
    if scale == 1.0:
        assert (bound < 2.0**-7 * squared_norms(queries).sqrt() * squared_norms(gallery).max().sqrt() * 2).all()


@pytest.mark.skipif(bf16_support(torch.device("cpu")) is None, reason="no bf16 on this CPU")
@pytest.mark.parametrize("dim", [3, 96, 1000, 6000])
def test_rounded_product_is_summed_in_float32_and_rounded_once(dim: int) -> None:
    """Of embeddings that lose nothing in bf16, so that only the summation's part of the bound is left."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, dim, generator=generator).bfloat16().float() for n in (30, 400))
    left, right = rounded_queries(queries), rounded_gallery(gallery, squared_norms(gallery).float(), 400)
    assert left.residuals.max() == right.residuals.max() == 0
    true = gallery.double().square().sum(1) - 2 * queries.double() @ gallery.double().t()
    bound = rounded_error(squared_norms(queries), float(squared_norms(gallery).max().sqrt()), dim, left.residuals, 0.0)
    product = (left.factors @ right.factors.t()).double()
    assert ((product - true).abs() <= bound[:, None] + 2.0**-8 * (true.abs() + bound[:, None])).all()
    # A sum rounded to bf16 on its way would be off by this much.
    assert (bound[:, None] < 2.0**-8 * squared_norms(gallery)).all() or dim == 6000


def test_squared_norms_not_finite_values_show() -> None:
    embeddings = torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    norms = squared_norms(embeddings)
    assert norms[0] == 25
    assert not norms[1:].isfinite().any()
