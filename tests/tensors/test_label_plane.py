"""The plane of the labels' means against scikit-learn's principal axes, and what must not change it."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from distributed_rerank.tensors.label_plane import label_plane


def drawn(n_labels: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_labels).repeat_interleave(5) * 3
    centres = 4 * torch.randn(n_labels, dim, generator=generator)
    return centres.repeat_interleave(5, 0) + torch.randn(len(labels), dim, generator=generator), labels


def test_axes_are_the_principal_axes_of_the_means() -> None:
    x, labels = drawn(12, 7)
    means = np.stack([x[labels == label].mean(0).numpy() for label in labels.unique()])
    expected = PCA(n_components=2).fit(means.astype(np.float64)).transform(x.numpy())
    found = label_plane(x, labels).numpy()
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, rtol=1e-4, atol=1e-4)


def test_order_of_images_and_number_of_a_label_do_not_move_a_place() -> None:
    x, labels = drawn(6, 5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(label_plane(x[order], labels[order]), label_plane(x, labels)[order])
    twice, names = torch.cat([x, x[:5]]), torch.cat([labels, labels[:5]])
    torch.testing.assert_close(label_plane(twice, names)[: len(x)], label_plane(x, labels))


@pytest.mark.parametrize(("n_labels", "dim"), [(2, 5), (4, 1), (1, 3)])
def test_too_few_directions_leave_zeros(n_labels: int, dim: int) -> None:
    places = label_plane(*drawn(n_labels, dim))
    assert places.shape == (5 * n_labels, 2)
    assert places.isfinite().all()
    assert (places[:, 1].abs() < 1e-5).all()
