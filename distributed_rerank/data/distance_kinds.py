"""Distances and scores of other systems as L2 distances, which is what models and chains are trained on.

For embeddings of length 1 all five kinds are functions of one another: squared L2 = 2 - 2 cosine. Values are converted
in float64, before they are rounded to float32, so that the same neighbours get the same distances from any kind.
"""

import numpy as np
from jaxtyping import Float64

from distributed_rerank.config.choices import DistanceKind
from distributed_rerank.errors import BadInput

SIMILARITIES = ("cosine", "inner_product")
"""Kinds of which the largest value is the nearest."""
TOLERANCE = 1e-3
"""Of values of unit vectors: half-precision arithmetic gives cosines such as 1.0005."""
_HIGHEST = {"l2": 2.0, "squared_l2": 4.0, "one_minus_cosine": 2.0, "cosine": 1.0, "inner_product": 1.0}
"""Of two vectors of length 1; the lowest is 0, of similarities -1."""


def to_l2(values: Float64[np.ndarray, " pair"], kind: DistanceKind) -> Float64[np.ndarray, " pair"]:
    """L2 distances of unit vectors from their distances of this kind, or from their negative similarities.

    Pairs that rounding has put nearer than equal ones are equal ones.
    """
    if kind == "l2":
        return np.maximum(values, 0)
    factor, offset = {"squared_l2": (1, 0), "one_minus_cosine": (2, 0)}.get(kind, (2, 2))
    return np.sqrt(np.maximum(offset + factor * values, 0))


def guess_kind(low: float, high: float, is_unit: bool | None) -> DistanceKind | None:
    """The kind of values from `low` to `high`, small = same; None where none fits.

    `is_unit`: whether the embeddings have length 1; None = not known.
    """
    if low < -TOLERANCE or high <= 0 > low:  # negative, so similarities
        return "cosine" if max(-low, high) <= 1 + TOLERANCE else "inner_product"
    if is_unit is not True or high <= _HIGHEST["l2"] + TOLERANCE:
        return "l2"
    return "squared_l2" if high <= _HIGHEST["squared_l2"] + TOLERANCE else None


def bounds(kind: DistanceKind, is_unit: bool | None) -> tuple[float, float]:
    """Lowest and highest value of the kind, small = same, with the tolerance; infinite where lengths decide."""
    if kind in ("l2", "squared_l2"):
        return -TOLERANCE, _HIGHEST[kind] + TOLERANCE if is_unit else np.inf
    if kind == "inner_product" and not is_unit:
        return -np.inf, np.inf
    return (-1.0 if kind in SIMILARITIES else 0.0) - TOLERANCE, _HIGHEST[kind] + TOLERANCE


class Conversion:
    """Turns the values of lists into L2 distances as they come in; guesses their kind from the first ones unless told.

    `kind` is None before the first value, and where no kind fits. `is_l2`: whether the values are converted; where they
    are not, they only order the candidates.
    """

    def __init__(self, told: DistanceKind | None = None, is_unit: bool | None = None) -> None:
        self.kind: DistanceKind | None = told
        self.is_guess = told is None
        self.is_l2 = True
        self._is_unit = is_unit
        self._is_score, self._low, self._high = False, np.inf, -np.inf

    def convert(self, values: Float64[np.ndarray, " row"], *, is_score: bool) -> Float64[np.ndarray, " row"]:
        """L2 distances of finite values, small = same (scores are negated); unchanged where that cannot be."""
        if not len(values):
            return values
        is_first = self._low > self._high
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        if is_first:
            self._is_score = is_score
            if self.is_guess:
                self.kind = guess_kind(self._low, self._high, self._is_unit)
            # Of longer vectors an angle says nothing about L2.
            has_lengths = self.kind in ("l2", "squared_l2") or self._is_unit is not False
            self.is_l2 = self.kind is not None and has_lengths and not (self.is_guess and self.problem())
        return to_l2(values, self.kind) if self.is_l2 and self.kind is not None else values

    def check_range(self, source: str) -> None:
        """Raises BadInput where a value cannot be one of the kind that was told, or that the first rows looked like."""
        problem = self.problem()
        if problem and (self.is_l2 or not self.is_guess):
            raise BadInput(f"{source}: {problem}; say with --distances what the values are")

    def problem(self) -> str:
        """What is wrong with the values seen; "" for nothing."""
        if self.kind is None or self._low > self._high:
            return ""
        if self.kind in SIMILARITIES and not self._is_score and self._low >= 0 and self._high > TOLERANCE:
            return (
                f"{self.kind} is a similarity (large = same), and column distance, where small = same, has values up "
                f"to {self._high:.6g}: call the column score, or if they are 1 - cosine give one_minus_cosine"
            )
        lowest, highest = bounds(self.kind, self._is_unit)
        if lowest <= self._low and self._high <= highest:
            return ""
        worst = self._low if self._low < lowest else self._high
        length = " of embeddings of length 1" if self._is_unit else ""
        return f"the {self._column} {-worst if self._is_score else worst:.6g} cannot be {self.kind}{length}"

    def describe(self) -> str:
        """The column, its range, and the kind that it is taken for."""
        low, high = (-self._high, -self._low) if self._is_score else (self._low, self._high)
        kind = self.kind if self.is_l2 else "no distances of the model's embeddings"
        return f"column {self._column} from {low:.6g} to {high:.6g} is taken for {kind}"

    @property
    def _column(self) -> str:
        return "score" if self._is_score else "distance"
