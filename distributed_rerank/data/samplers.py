"""Batches with equally many items of several labels, planned from (seed, epoch) alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from distributed_rerank.errors import BadInput


@dataclass(frozen=True, eq=False)
class BalanceSampler:
    """OML's BalanceSampler as a pure function of the epoch.

    `labels` [item] are label codes; items with -1 and labels of one item are never drawn. A batch has `n_labels`
    labels, or all where there are fewer, and `n_instances` items of each, one label after the other. An epoch is
    (number of labels // labels of a batch) batches in which a label comes at most once. Items of a label do not
    repeat; where there are fewer than `n_instances`, all come once, then the rest is drawn with repetition. Raises
    BadInput where the labels allow no pairs.
    """

    labels: Int64[np.ndarray, " item"]
    n_labels: int
    n_instances: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_instances < 2:
            raise BadInput(f"n_instances={self.n_instances} gives no positive pair; use at least 2")
        if self.n_labels < 2:
            raise BadInput(f"n_labels={self.n_labels} gives no negative pair; use at least 2")
        if len(self._usable) < 2:
            raise BadInput(
                f"{len(self._usable)} labels of the training images have two items or more where two labels are "
                "needed; add images"
            )

    @cached_property
    def _usable(self) -> Int64[np.ndarray, " label"]:
        """Labels of two items or more, ascending."""
        names, counts = np.unique(self.labels[self.labels >= 0], return_counts=True)
        return names[counts > 1]

    @property
    def labels_of_batch(self) -> int:
        """Labels in each batch."""
        return min(self.n_labels, len(self._usable))

    @property
    def n_batches(self) -> int:
        """Batches in an epoch."""
        return len(self._usable) // self.labels_of_batch

    def batches(self, epoch: int) -> list[Int64[np.ndarray, " batch"]]:
        """The batches of an epoch as positions in `labels`; they depend on (seed, epoch) only."""
        rng = np.random.default_rng([self.seed, epoch])
        order = np.argsort(self.labels, kind="stable").astype(np.int64)
        order = order[np.isin(self.labels[order], self._usable)]
        starts = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        items_of_label = np.split(order, starts[1:])
        drawn = rng.permutation(len(items_of_label))[: self.n_batches * self.labels_of_batch]
        return [
            np.concatenate([self._draw(items_of_label[code], rng) for code in codes])
            for codes in drawn.reshape(self.n_batches, self.labels_of_batch)
        ]

    def _draw(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(items) >= self.n_instances:
            return rng.choice(items, self.n_instances, replace=False)
        repeated = rng.choice(items, self.n_instances - len(items), replace=True)
        return np.concatenate([rng.permutation(items), repeated])
