"""The two sides of the train labels: one is trained on while the other is set aside, or either half in turn.

Labels of one group, such as look-alikes (`tensors.look_alikes`), are on one side.
"""

import numpy as np
from jaxtyping import Bool, Int64

from distributed_rerank.errors import BadInput

LABELS_TO_CHOOSE_ON = 4
"""Of two images or more: 2 to train on and 2 to choose on. With fewer the chain is the first stage."""
SHARE_ASIDE, LABELS_ASIDE, MOST_ASIDE = 0.25, 16, 0.4
"""Without a share given: this share of the labels, but so many labels where that is no more than the larger share."""


def set_aside_labels(
    labels: Int64[np.ndarray, " item"],
    share: float | None,
    seed: int,
    groups: Int64[np.ndarray, " label"] | None = None,
) -> Bool[np.ndarray, " item"]:
    """Which items belong to the labels that are not trained on: `share` of the labels, drawn by `seed`.

    None = `SHARE_ASIDE`, but `LABELS_ASIDE` labels as far as they are no more than `MOST_ASIDE` of all. With `groups`,
    which has the group of each label, one group after the other is drawn, and the last one may be split. Items without
    a label (-1) belong to neither side and are False. Labels with one image are split in the same proportion. Raises
    BadInput where either side would have fewer than two labels with two images.
    """
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    n_usable, n_single = int((counts > 1).sum()), int((counts == 1).sum())
    least = min(LABELS_ASIDE, int(MOST_ASIDE * n_usable)) if share is None else 2
    share = SHARE_ASIDE if share is None else share
    n_aside = max(2, least, round(share * n_usable))
    if n_usable - n_aside < 2:
        raise BadInput(
            f"{n_usable} train labels with two images or more are too few for set_aside={share}: "
            "at least 2 must be set aside and 2 remain; give more labels or a smaller share"
        )
    # [label] places in `known`, in the order in which labels are drawn.
    drawn = np.random.default_rng([seed, 0x5E7]).permutation(len(known))
    if groups is not None:
        drawn = drawn[by_first_place(groups[known[drawn]])]
    is_usable = counts[drawn] > 1
    aside = [drawn[is_usable][:n_aside], drawn[~is_usable][: round(share * n_single)]]
    return np.isin(labels, known[np.concatenate(aside)])


def by_first_place(groups: Int64[np.ndarray, " entry"]) -> Int64[np.ndarray, " entry"]:
    """The order in which entries of one group stand together, the groups by their first entry."""
    _, first_place, number = np.unique(groups, return_index=True, return_inverse=True)
    return first_place[number].argsort(kind="stable")


def sides(
    labels: Int64[np.ndarray, " item"],
    share: float | None,
    seed: int,
    groups: Int64[np.ndarray, " label"] | None = None,
) -> Int64[np.ndarray, " item"]:
    """0 for an item that is trained on, 1 for one that is set aside, -1 for one without a label.

    With 2 or 3 labels of two images or more, where no label can be set aside, every second image of each label is.
    """
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    if 2 <= int((counts > 1).sum()) < LABELS_TO_CHOOSE_ON:
        place = np.zeros(len(labels), np.int64)
        for label in known:
            place[labels == label] = np.arange(int((labels == label).sum()))
        return np.where(labels < 0, -1, place % 2)
    return np.where(labels < 0, -1, set_aside_labels(labels, share, seed, groups).astype(np.int64))
