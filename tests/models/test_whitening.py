import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.models.whitening import Projection, principal_directions, within_label_whitening


@pytest.fixture(scope="module")
def labelled():
    """Three informative directions of 12, drowned by large variation within labels in the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40).repeat_interleave(8)
    noise = torch.randn(320, 12, generator=generator) * torch.tensor([0.02] * 3 + [5.0] * 9)
    centres = torch.zeros(40, 12)
    centres[:, :3] = torch.randn(40, 3, generator=generator)
    return centres[labels] + noise, labels


def nearest_is_same(rows, labels):
    distances = torch.cdist(rows, rows).fill_diagonal_(float("inf"))
    return (labels[distances.argmin(dim=1)] == labels).float().mean()


def test_within_label_whitening_scatter_within_labels_becomes_the_identity(labelled):
    features, labels = labelled
    mean, matrix = within_label_whitening(features, labels, dim=12, shrinkage=1e-9)
    projected = (features - mean) @ matrix
    within = torch.cat([projected[labels == c] - projected[labels == c].mean(dim=0) for c in labels.unique()])
    torch.testing.assert_close(within.T @ within / len(within), torch.eye(12), rtol=0, atol=1e-2)
    torch.testing.assert_close(mean, features.mean(dim=0))


def test_within_label_whitening_recovers_labels_that_raw_distances_miss(labelled):
    features, labels = labelled
    project = Projection(12, 12).fit(features, labels, shrinkage=1e-6)
    assert nearest_is_same(features, labels) < 0.3
    assert nearest_is_same(project(features), labels) > 0.6
    torch.testing.assert_close(project(features).norm(dim=1), torch.ones(320))


def test_within_label_whitening_fewer_directions_than_dim_pads_with_zeros(labelled):
    features, labels = labelled
    _, matrix = within_label_whitening(features[:10], labels[:10], dim=20, shrinkage=0.1)
    assert matrix.shape == (12, 20)
    assert torch.equal(matrix[:, 9:], torch.zeros(12, 11))
    assert (matrix[:, :9].abs().sum(dim=0) > 0).all()


def test_within_label_whitening_of_equal_rows_is_finite():
    _, matrix = within_label_whitening(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), dim=2, shrinkage=0.05)
    assert torch.isfinite(matrix).all()


def test_principal_directions_many_channels_are_found_alike_and_leave_the_random_state():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=generator) @ torch.randn(5, 1100, generator=generator)
    centred = rows - rows.mean(dim=0)
    state = torch.get_rng_state()
    found = principal_directions(centred, dim=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, principal_directions(centred, dim=4))
    exact = torch.linalg.svd(centred, full_matrices=False).Vh[:4]
    torch.testing.assert_close((exact @ found).abs(), torch.eye(4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_within_label_whitening_without_two_images_of_a_label_is_refused(labels):
    with pytest.raises(BadInput, match="give labels with two images or more"):
        within_label_whitening(torch.randn(len(labels), 3), torch.tensor(labels), dim=2, shrinkage=0.1)


def test_within_label_whitening_labels_of_one_row_do_not_shrink_the_scatter(labelled):
    features, labels = labelled
    alone = torch.cat([labels, 100 + torch.arange(320)])
    projections = [
        within_label_whitening(torch.cat([features, features]), rows, dim=12, shrinkage=1e-9)[1]
        for rows in (labels.repeat(2), alone)
    ]
    metrics = [matrix @ matrix.T for matrix in projections]
    torch.testing.assert_close(metrics[1], metrics[0], rtol=1e-2, atol=1e-1)
