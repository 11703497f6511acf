"""Distances of other systems as L2 distances: against float64 geometry, and what they are taken for."""

import numpy as np
import pytest

from distributed_rerank.config.choices import DistanceKind
from distributed_rerank.data.distance_kinds import Conversion, guess_kind, to_l2
from distributed_rerank.errors import BadInput


def of_unit_vectors(seed: int = 0) -> dict[str, np.ndarray]:
    """Every kind of 500 pairs of unit vectors, near ones among them, similarities negated."""
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(2, 500, 8))
    right = left + right * np.geomspace(1e-3, 10, 500)[:, None]
    left, right = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right))
    cosine = (left * right).sum(axis=1)
    l2 = np.linalg.norm(left - right, axis=1)
    return {
        "l2": l2, "squared_l2": l2**2, "cosine": -cosine, "one_minus_cosine": 1 - cosine, "inner_product": -cosine
    }  # fmt: skip


@pytest.mark.parametrize("kind", of_unit_vectors())
def test_every_kind_gives_the_l2_distance(kind: DistanceKind) -> None:
    pairs = of_unit_vectors()
    found = Conversion(kind, is_unit=True).convert(pairs[kind], is_score=kind in ("cosine", "inner_product"))
    np.testing.assert_allclose(found, pairs["l2"], rtol=1e-9, atol=1e-12)
    assert (np.argsort(found, kind="stable") == np.argsort(pairs["l2"], kind="stable")).all()


def test_rounding_beyond_the_ends_is_the_end() -> None:
    assert to_l2(np.array([-1.0005, -1.0, 1.0]), "cosine").tolist() == [0, 0, 2]
    assert to_l2(np.array([-1e-7]), "squared_l2").tolist() == [0]
    assert to_l2(np.array([-1e-7]), "one_minus_cosine").tolist() == [0]


@pytest.mark.parametrize(
    ("low", "high", "is_unit", "kind"),
    [
        (0, 1.9, True, "l2"), (0.1, 3.9, True, "squared_l2"), (0, 97, True, None), (0, 97, False, "l2"),
        (0, 97, None, "l2"), (0, 3, None, "l2"), (-1, 0.4, True, "cosine"), (-0.9, -0.1, True, "cosine"),
        (-0.0005, -0.0001, True, "cosine"), (-1e-7, 1.2, True, "l2"), (-97, -3, True, "inner_product"),
        (-97, 3, False, "inner_product"), (0, 0, True, "l2"),
    ],
)  # fmt: skip
def test_kind_is_guessed_from_the_range(low: float, high: float, is_unit: bool | None, kind: str | None) -> None:
    assert guess_kind(float(low), float(high), is_unit) == kind


def test_guess_holds_for_later_rows_or_is_refused() -> None:
    conversion = Conversion(is_unit=True)
    conversion.convert(np.array([-0.9, -0.2]), is_score=True)
    conversion.check_range("lists")
    conversion.convert(np.array([-12.0]), is_score=True)
    with pytest.raises(BadInput, match="lists: the score 12 cannot be cosine"):
        conversion.check_range("lists")


def test_values_that_cannot_be_what_was_told_are_refused() -> None:
    for kind, values, words in (
        ("l2", [0.1, 2.5], "2.5 cannot be l2 of embeddings of length 1"),
        ("squared_l2", [0.1, 4.5], "4.5 cannot be squared_l2"),
        ("one_minus_cosine", [0.1, 2.5], "2.5 cannot be one_minus_cosine"),
        ("l2", [-0.5, 0.3], "-0.5 cannot be l2"),
        ("cosine", [0.1, 0.4], "cosine is a similarity"),
    ):
        conversion = Conversion(kind, is_unit=True)  # pyright: ignore[reportArgumentType]
        conversion.convert(np.array(values), is_score=False)
        with pytest.raises(BadInput, match=words):
            conversion.check_range("lists")


def test_angles_of_longer_vectors_stay_what_they_are() -> None:
    for kind in ("cosine", "one_minus_cosine", "inner_product"):
        conversion = Conversion(kind, is_unit=False)
        values = np.array([-0.5, -0.25]) if kind != "one_minus_cosine" else np.array([0.25, 0.5])
        assert conversion.convert(values, is_score=True).tolist() == values.tolist()
        assert not conversion.is_l2
    longer = Conversion("squared_l2", is_unit=False)
    assert longer.convert(np.array([16.0, 25.0]), is_score=False).tolist() == [4, 5]
