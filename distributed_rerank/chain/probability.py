"""The probability of a match from a distance of the chain's output.

A logit or a fused distance orders candidates but does not say how sure a match is. A logistic curve on the distances of
the chain's output does.
"""

from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.tensors import calibration


def probabilities(chain: Chain, distances: Tensor) -> Tensor | None:
    """Probability of a match for distances of this chain's output; None where it has no calibration."""
    if not chain.calibration:
        return None
    curve = calibration.Logistic(chain.calibration["slope"], chain.calibration["intercept"])
    return calibration.probability(distances, curve)
