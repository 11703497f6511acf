"""Adapters: against a plain computation in numpy, what they do to planted scatter, and through a file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.models.adapter import ADAPTER, SHRINKAGE, fit_adapters, load_adapter, save_adapter

N_LABELS, N_IMAGES, DIM = 30, 6, 24
KINDS = [("centre", 0.0), ("whiten", 0.0), ("discriminate", 1.0)]


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of labels that differ in the first 8 directions and scatter in the last 8."""
    state = np.random.default_rng(seed)
    labels = np.repeat(np.arange(N_LABELS), N_IMAGES)
    scale = np.r_[np.full(8, 1.0), np.full(8, 0.1), np.zeros(8)]
    scatter = np.r_[np.full(8, 0.3), np.full(8, 0.1), np.full(8, 2.0)]
    points = (
        state.standard_normal((N_LABELS, DIM))[labels] * scale + state.standard_normal((len(labels), DIM)) * scatter
    )
    return (points + 3).astype(np.float32), labels


def by_numpy(points: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines of all pairs after each map, each written out."""
    x = points.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x -= x.mean(axis=0)
    means = np.stack([x[labels == label].mean(axis=0) for label in range(N_LABELS)])
    rest = x - means[labels]
    within = rest.T @ rest / len(rest)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * np.trace(within) / DIM * np.eye(DIM)
    inverse = np.linalg.inv(within)
    # By the metric of x^T A y: A = W^-1 for whitening; for discriminating A = W^-1/2 s(B) W^-1/2.
    values, vectors = np.linalg.eigh(within)
    root = vectors / np.sqrt(values) @ vectors.T
    b, q = np.linalg.eigh(root @ means.T @ means @ root / (N_LABELS - 1))
    strength = b.clip(0) + b.clip(0).mean()
    stretched = root @ (q * (strength / (1 + strength))) @ q.T @ root
    return {
        name: cosines(x, a)
        for name, a in zip(("centre", "whiten", "discriminate"), (np.eye(DIM), inverse, stretched), strict=True)
    }


def cosines(x: np.ndarray, metric: np.ndarray) -> np.ndarray:
    products = x @ metric @ x.T
    return products / np.sqrt(np.outer(products.diagonal(), products.diagonal()))


def test_adapters_are_what_plain_matrices_give() -> None:
    points, labels = planted()
    expected = by_numpy(points, labels)
    adapters = fit_adapters(torch.from_numpy(points), torch.from_numpy(labels), KINDS)
    for (kind, _), adapter in zip(KINDS, adapters, strict=True):
        assert adapter is not None
        mapped = adapter(points).astype(np.float64)
        np.testing.assert_allclose(mapped @ mapped.T, expected[kind], atol=2e-5)


def test_a_fitted_map_brings_new_labels_together() -> None:
    points, labels = planted(0)
    others, other_labels = planted(1)
    right = {}
    for (kind, _), adapter in zip(
        KINDS, fit_adapters(torch.from_numpy(points), torch.from_numpy(labels), KINDS), strict=True
    ):
        assert adapter is not None
        mapped = adapter(others)
        similarity = mapped @ mapped.T - 2 * np.eye(len(mapped))
        right[kind] = float((other_labels[similarity.argmax(axis=1)] == other_labels).mean())
    assert right["whiten"] > right["centre"] + 0.2
    assert right["discriminate"] > right["centre"] + 0.2


def test_what_labels_do_not_allow_is_none() -> None:
    points, _ = planted()
    alone = fit_adapters(torch.from_numpy(points), torch.arange(len(points)), KINDS)
    assert [adapter is None for adapter in alone] == [False, True, True]
    single = fit_adapters(torch.from_numpy(points), torch.zeros(len(points), dtype=torch.int64), KINDS)
    assert [adapter is None for adapter in single] == [False, False, True]
    unlabelled = torch.from_numpy(np.where(np.arange(len(points)) < 60, planted()[1], -1))
    first = fit_adapters(torch.from_numpy(points), unlabelled, KINDS)[1]
    again = fit_adapters(torch.from_numpy(points[:60]), unlabelled[:60], KINDS)[1]
    assert first is not None
    assert again is not None
    assert first.digest() == again.digest()


def test_an_adapter_comes_back_from_its_file_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    points, labels = planted()
    adapter = fit_adapters(torch.from_numpy(points), torch.from_numpy(labels), KINDS)[1]
    assert adapter is not None
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path)
    assert loaded.digest() == adapter.digest()
    assert np.array_equal(loaded(points), adapter(points))
    assert loaded(points[:0]).shape == (0, DIM)
    with pytest.raises(BadInput, match="23 dimensions"):
        loaded(points[:, :23])
    (tmp_path / ADAPTER).unlink()
    with pytest.raises(BadInput, match=ADAPTER):
        load_adapter(tmp_path)
