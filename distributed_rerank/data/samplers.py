"""Batches with equally many items of several labels, planned from (seed, epoch) alone."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from distributed_rerank.errors import BadInput


@dataclass(frozen=True, eq=False)
class BalanceSampler:
    """OML's BalanceSampler as a pure function of the epoch.

    `labels` [item] are label codes; items with -1 are never drawn. A batch has `n_labels` labels and
    `n_instances` items of each, one label after the other. An epoch is (number of labels // n_labels) batches
    in which a label comes at most once. Items of a label do not repeat; where there are fewer than
    `n_instances`, all come once, then the rest is drawn with repetition. Raises BadInput where the labels do
    not allow that.
    """

    labels: Int64[np.ndarray, " item"]
    n_labels: int
    n_instances: int
    seed: int = 0

    def __post_init__(self) -> None:
        names, counts = np.unique(self.labels[self.labels >= 0], return_counts=True)
        if self.n_instances < 2:
            raise BadInput(f"n_instances={self.n_instances} gives no positive pair; use at least 2")
        if self.n_labels < 2:
            raise BadInput(f"n_labels={self.n_labels} gives no negative pair; use at least 2")
        if self.n_labels > len(names):
            raise BadInput(
                f"n_labels={self.n_labels} exceeds the {len(names)} labels of the training images; "
                "lower n_labels or add labels"
            )
        if (counts < 2).any():
            raise BadInput(
                f"{(counts < 2).sum()} labels have one item (first: code {names[counts < 2][0]}) where two "
                "are needed; add images or remove those labels"
            )

    @property
    def n_batches(self) -> int:
        """Batches in an epoch."""
        return len(np.unique(self.labels[self.labels >= 0])) // self.n_labels

    def batches(self, epoch: int) -> list[Int64[np.ndarray, " batch"]]:
        """The batches of an epoch as positions in `labels`; they depend on (seed, epoch) only."""
        rng = np.random.default_rng([self.seed, epoch])
        order = np.argsort(self.labels, kind="stable").astype(np.int64)
        order = order[np.count_nonzero(self.labels < 0) :]
        starts = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        items_of_label = np.split(order, starts[1:])
        drawn = rng.permutation(len(items_of_label))[: self.n_batches * self.n_labels]
        return [
            np.concatenate([self._draw(items_of_label[code], rng) for code in codes])
            for codes in drawn.reshape(self.n_batches, self.n_labels)
        ]

    def _draw(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(items) >= self.n_instances:
            return rng.choice(items, self.n_instances, replace=False)
        repeated = rng.choice(items, self.n_instances - len(items), replace=True)
        return np.concatenate([rng.permutation(items), repeated])
