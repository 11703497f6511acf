"""A chain tried on set-aside labels: its lists, its figures, and the curve from its distances to a probability.

The calibration error (ECE) of the curve is measured on labels that it was not fitted to, beside the error of the raw
sigmoid of the logit.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from distributed_rerank.chain.apply import apply
from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.evidence import Evidence
from distributed_rerank.tensors import calibration
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.metrics import PerQuery

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A chain with its lists and the metrics of each query."""

    chain: Chain
    values: PerQuery
    lists: CandidateLists = field(repr=False)

    def figures(self) -> dict[str, float]:
        """Mean mAP@10 and CMC@1."""
        return {key: float(self.values[key].mean()) for key in ("map@10", "cmc@1")}


def try_chain(evidence: Evidence, chain: Chain) -> Trial:
    """Measures one chain."""
    lists = apply(chain, evidence.lists, evidence.logits, evidence.embeddings)
    return Trial(chain, evidence.per_query(lists), lists)


def scored_depth(evidence: Evidence, chain: Chain) -> int:
    """The number of candidates in a list that a curve is fitted to: those that the pairwise step orders, or all."""
    return evidence.lists.items.shape[1] if chain.pairwise is None else chain.pairwise.top_n


def fit_curve(
    evidence: Evidence, trial: Trial, is_counted: Bool[Tensor, " query"] | None = None
) -> calibration.Logistic | None:
    """The curve from a distance of the trial's lists to the probability of a match, fitted to these queries.

    None where they lack matches or non-matches, or where a smaller distance does not mean a likelier match.
    """
    distances, is_match = evidence.labelled_pairs(trial.lists, scored_depth(evidence, trial.chain), is_counted)
    if not bool(is_match.any()) or bool(is_match.all()):
        return None
    curve = calibration.fit_logistic(distances, is_match)
    return curve if curve.slope > 0 else None


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
    raw = _raw_error(evidence)
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


def _raw_error(evidence: Evidence) -> float | None:
    """Calibration error of sigmoid(-logit), which is not fitted to anything; None without logits."""
    if evidence.logits is None:
        return None
    depth = evidence.logits.shape[1]
    by_logit = replace(evidence.lists.first(depth), distances=evidence.logits)
    logits, is_match = evidence.labelled_pairs(by_logit, depth)
    if not len(logits):
        return None
    return calibration.expected_calibration_error((-logits).double().sigmoid(), is_match)
