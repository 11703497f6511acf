"""The two steps of search against their definitions."""

import numpy as np
import pytest
import torch

from distributed_rerank.kernels import library, search

pytestmark = pytest.mark.skipif(not library.has_vector_kernels(), reason="no AVX-512, or no compiled kernels")


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 31, 32, 33, 63, 64, 100, 384, 1283])
@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e15])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_pair_distances_are_those_of_float64(dim, scale, offset):
    generator = torch.Generator().manual_seed(dim)
    queries, gallery = ((torch.randn(n, dim, generator=generator) + offset) * scale for n in (11, 23))
    rows, columns = torch.randint(0, 11, (300,), generator=generator), torch.randint(0, 23, (300,), generator=generator)
    found = search.pair_distances(queries, gallery, rows, columns).numpy()
    exact = np.linalg.norm(
        queries.numpy().astype(np.float64)[rows] - gallery.numpy().astype(np.float64)[columns], axis=1
    )
    # At most the neighbour of the correctly rounded one, and that hardly ever: a tie within 1e-13.
    assert (found == exact.astype(np.float32)).mean() > 0.99
    np.testing.assert_allclose(found, exact, rtol=2.0**-24 * (1 + 1e-6))


def test_pair_distances_of_equal_rows_and_of_no_pair():
    rows = torch.randn(9, 384) * 3 + 1e4
    same = torch.arange(9)
    assert torch.equal(search.pair_distances(rows, rows.clone(), same, same), torch.zeros(9))
    assert search.pair_distances(rows, rows, same[:0], same[:0]).shape == (0,)


def test_pair_distances_take_contiguous_rows_only():
    with pytest.raises(AssertionError, match="row after row"):
        search.pair_distances(torch.randn(8, 8).T, torch.randn(8, 8), torch.arange(8), torch.arange(8))


@pytest.mark.parametrize("n_groups", [1, 2, 50])
def test_group_minima_are_those_of_torch(n_groups):
    entries = torch.randn(7, n_groups * search.GROUP, generator=torch.Generator().manual_seed(0)).bfloat16()
    entries[2], entries[3, : search.GROUP], entries[4, 5] = torch.inf, -torch.inf, -0.0
    expected = entries.float().view(7, n_groups, search.GROUP).amin(dim=2)
    assert torch.equal(search.group_minima(entries), expected)
