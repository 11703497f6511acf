"""Which labels of the train split are set aside, and which of the others are fitted without each other. Layer
3."""

import numpy as np
from jaxtyping import Bool, Int64

from distributed_rerank.errors import BadInput


def set_aside_labels(labels: Int64[np.ndarray, " item"], share: float, seed: int) -> Bool[np.ndarray, " item"]:
    """Which items belong to the labels that are not trained on: `share` of the labels, drawn by `seed`.

    Items without a label (-1) belong to neither side and are False. Labels with one image are shared out
    likewise. Raises BadInput where either side would have fewer than two labels with two images.
    """
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    usable, single = known[counts > 1], known[counts == 1]
    generator = np.random.default_rng([seed, 0x5E7])
    n_aside = max(2, round(share * len(usable)))
    if len(usable) - n_aside < 2:
        raise BadInput(
            f"{len(usable)} train labels with two images or more are too few for set_aside={share}: "
            "at least 2 must be set aside and 2 remain; give more labels or a smaller share"
        )
    drawn = [
        generator.permutation(usable)[:n_aside],
        generator.permutation(single)[: round(share * len(single))],
    ]
    return np.isin(labels, np.concatenate(drawn))


def sides(labels: Int64[np.ndarray, " item"], share: float, seed: int) -> Int64[np.ndarray, " item"]:
    """0 for an item that is trained on, 1 for one that is set aside, -1 for one without a label."""
    return np.where(labels < 0, -1, set_aside_labels(labels, share, seed).astype(np.int64))


def halves(labels: Int64[np.ndarray, " item"], seed: int) -> Int64[np.ndarray, " item"]:
    """Half 0 or 1 of each item, the same for all of a label; -1 for an item without a label."""
    return sides(labels, 0.5, seed)
