"""The probability of a match from a distance of the chain's output, and its calibration error.

A logit or a fused distance orders candidates but does not say how sure a match is. A logistic curve on the distances of
the chain's output does. Its calibration error (ECE) is measured on labels that the curve was not fitted to, beside the
error of the raw sigmoid of the logit.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.evidence import Evidence, Trial, fit_curve, scored_depth
from distributed_rerank.tensors import calibration

logger = logging.getLogger(__name__)


def calibrate(evidence: Evidence, chosen: Trial, is_first_half: Bool[Tensor, " query"]) -> dict[str, Any]:
    """The curve from the distances of the chain's output to the probability of a match, for chain.json.

    `slope, intercept`: p = sigmoid(intercept - slope * distance), fitted to all labels. `ece`: its error, each half of
    the labels measured with the curve of the other half. `ece_raw`: the error of sigmoid(-logit), None without logits.
    Both over the candidates that the pairwise step orders. {} where no curve can be fitted.
    """
    curve = fit_curve(evidence, chosen)
    first, second = (fit_curve(evidence, chosen, is_first_half == is_first) for is_first in (True, False))
    if curve is None or first is None or second is None:
        return {}
    depth = scored_depth(evidence, chosen.chain)
    predicted, truth = [], []
    for fitted, others in ((first, ~is_first_half), (second, is_first_half)):
        distances, is_match = evidence.labelled_pairs(chosen.lists, depth, others)
        predicted.append(calibration.probability(distances, fitted))
        truth.append(is_match)
    ece = calibration.expected_calibration_error(torch.cat(predicted), torch.cat(truth))
    raw = raw_error(evidence)
    logger.info(
        "probability of a match: calibration error %.4f on labels the curve was not fitted to%s",
        ece,
        "" if raw is None else f", {raw:.4f} of the raw sigmoid of the logit",
    )
    return {
        "slope": curve.slope,
        "intercept": curve.intercept,
        "ece": ece,
        "ece_raw": raw,
        "n_pairs": sum(len(part) for part in truth),
    }


def raw_error(evidence: Evidence) -> float | None:
    """Calibration error of sigmoid(-logit), which is not fitted to anything; None without logits."""
    if evidence.logits is None:
        return None
    depth = evidence.logits.shape[1]
    by_logit = replace(evidence.lists.first(depth), distances=evidence.logits)
    logits, is_match = evidence.labelled_pairs(by_logit, depth)
    if not len(logits):
        return None
    return calibration.expected_calibration_error((-logits).double().sigmoid(), is_match)


def probabilities(chain: Chain, distances: Tensor) -> Tensor | None:
    """Probability of a match for distances of this chain's output; None where it has no calibration."""
    if not chain.calibration:
        return None
    curve = calibration.Logistic(chain.calibration["slope"], chain.calibration["intercept"])
    return calibration.probability(distances, curve)
