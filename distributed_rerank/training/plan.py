"""The plan of a training: which pairs each optimizer step trains on.

It is decided before any image is opened, by pure functions of lists, labels, config, seed and epoch. Every worker makes
the same plan and takes its share of each step. So the plan does not depend on the number of workers, and a resumed run
trains on the pairs of an uninterrupted one.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.samplers import BalanceSampler
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.candidate_mining import draw_lists, filter_negatives
from distributed_rerank.tensors.distances import exact_pair_distances
from distributed_rerank.tensors.mining import hard_pairs
from distributed_rerank.tensors.sharding import rank_share

MAX_PASSES = 30
"""Lists of one anchor in an epoch, at most: few anchors are soon known by heart."""


@dataclass(frozen=True)
class TrainingStep:
    """The pairs of one optimizer step. Pairs of one list are adjacent; lists are numbered 0, 1, ... in order."""

    query_items: Int64[Tensor, " pair"]
    gallery_items: Int64[Tensor, " pair"]
    is_negative: Bool[Tensor, " pair"]
    list_of_pair: Int64[Tensor, " pair"]
    first_stage_distance: Float[Tensor, " pair"]
    teacher_logits: Float[Tensor, " pair"] | None = None
    """NaN where the teacher has not scored the pair; None = no teacher."""

    def __len__(self) -> int:
        return len(self.query_items)

    def n_lists(self) -> int:
        """Lists the pairs belong to."""
        return int(self.list_of_pair[-1]) + 1 if len(self) else 0

    def n_units(self, loss: str) -> int:
        """The count that the step's loss is a mean over: lists for list losses, else pairs."""
        return self.n_lists() if is_list_loss(loss) else len(self)

    def take(self, start: int, stop: int) -> "TrainingStep":
        """Pairs start to stop - 1; their lists are numbered from 0 again."""
        part = {name: column[start:stop] for name, column in self.columns().items()}
        if start < stop:
            part["list_of_pair"] = part["list_of_pair"] - part["list_of_pair"][0]
        return TrainingStep(**part)

    def columns(self) -> dict[str, Tensor]:
        """The columns by name, without teacher_logits where there is no teacher."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def is_list_loss(loss: str) -> bool:
    """Whether the loss of a pair depends on the other pairs of its list."""
    return loss != "bce"


def share_of(step: TrainingStep, number: int, n_shares: int, is_by_list: bool) -> TrainingStep:
    """Share `number` of `n_shares`, contiguous pairs or whole lists. Shares cover the step and may be empty."""
    start, stop = rank_share(step.n_lists() if is_by_list else len(step), number, n_shares)
    if is_by_list:
        start, stop = torch.searchsorted(step.list_of_pair, torch.tensor([start, stop])).tolist()
    return step.take(start, stop)


def seed_of(*numbers: int) -> int:
    """A seed mixed from non-negative integers; the same on every machine, different for other numbers."""
    state = np.random.SeedSequence(list(numbers)).generate_state(2, np.uint32)
    return int(state[0]) << 31 | int(state[1]) >> 1


def plan_digest(steps: Iterable[TrainingStep]) -> str:
    """A digest of every pair of the steps, in order."""
    digest = hashlib.sha256()
    for step in steps:
        digest.update(len(step).to_bytes(8, "little"))
        for column in step.columns().values():
            digest.update(np.ascontiguousarray(column.numpy()).tobytes())
    return digest.hexdigest()


def labels_among(lists: CandidateLists, labels: Int64[np.ndarray, " item"]) -> Int64[Tensor, " item"]:
    """Labels of the lists' own anchors and candidates; -1 for every other item: neither positive nor negative."""
    own = torch.full((len(labels),), -1)
    for items in (lists.query_items, lists.items[lists.items >= 0]):
        own[items] = tensor_of(labels)[items]
    return own


def plan_batches(
    items: Int64[np.ndarray, " trained"],
    labels: Int64[np.ndarray, " item"],
    embeddings: Float[Tensor, "item dim"],
    config: TrainingConfig,
    epoch: int,
) -> list[TrainingStep]:
    """Balanced batches of `items`, one a step; an image's list holds its pairs within the batch.

    mining=batch is OML's recipe and takes the hard pairs by first-stage distance. mining=whole_batch pairs every image
    with all others; with a listwise loss on distances this is supervised contrastive training (Khosla et al. 2020).
    `labels` and `embeddings` are those of all items.
    """
    sampler = BalanceSampler(labels[items], config.n_labels, config.n_instances, config.seed)
    label_of_item = tensor_of(labels)
    steps = []
    for batch in sampler.batches(epoch):
        # [image]: the items of the batch, ascending, once each. `first` and `second` [pair] index it.
        images = tensor_of(np.unique(items[batch]))
        if config.mining == "batch":
            first, second, _ = hard_pairs(embeddings[images], label_of_item[images])
            # Hard pairs come positives first; pairs of one list must be adjacent.
            order = first.argsort(stable=True)
            first, second = first[order], second[order]
        else:
            first, second = (~torch.eye(len(images), dtype=torch.bool)).nonzero(as_tuple=True)
        queries, gallery = images[first], images[second]
        is_negative = label_of_item[queries] != label_of_item[gallery]
        steps.append(make_step(queries, gallery, is_negative, queries, embeddings))
    return steps


def plan_lists(
    anchors: CandidateLists,
    labels: Int64[np.ndarray, " item"],
    sequences: Int64[np.ndarray, " item"],
    embeddings: Float[Tensor, "item dim"],
    config: TrainingConfig,
    epoch: int,
) -> list[TrainingStep]:
    """Lists of one positive and `n_negatives` negatives of the anchors that have both.

    Negatives are drawn from the anchor's own candidates (`tensors.candidate_mining`), so they are distributed like the
    pairs that are re-ranked later. The anchors come in random order, each once, and again from the start while
    `steps_per_epoch` asks for more. `labels`, `sequences` and `embeddings` are those of all items. Raises BadInput
    where no anchor has both a positive and a negative.
    """
    items, own = anchors.query_items, labels_among(anchors, labels)
    # [anchor, candidate]: negatives that pass the filters.
    allowed, _ = filter_negatives(anchors, own, config.filters, embeddings, tensor_of(sequences))
    # Each round draws one list for every anchor: its query [list] and its candidates [list, 1 + negatives].
    rounds: list[tuple[Tensor, Tensor]] = []
    wanted = None
    if config.steps_per_epoch is not None:
        wanted = min(config.steps_per_epoch * config.lists_per_step, MAX_PASSES * len(items))
    while not rounds or (wanted is not None and sum(len(queries) for queries, _ in rounds) < wanted):
        generator = torch.Generator().manual_seed(seed_of(config.seed, epoch, len(rounds)))
        lists = draw_lists(
            anchors, own, allowed, n_negatives=config.n_negatives, generator=generator,
            beyond_share=config.share_beyond, temperature=config.negative_temperature, sequences=tensor_of(sequences),
        )  # fmt: skip
        if not len(lists.rows):
            raise BadInput("no image has a positive and a negative candidate; raise --n-items or relax the filters")
        order = torch.randperm(len(lists.rows), generator=generator)
        rounds.append((items[lists.rows[order]], lists.items[order]))
    # All rounds one after the other, cut to the number wanted, then cut into steps; the last step may be shorter.
    queries, candidates = (
        torch.cat(column)[:wanted].split(config.lists_per_step) for column in zip(*rounds, strict=True)
    )
    return [step_of_lists(*step, embeddings) for step in zip(queries, candidates, strict=True)]


def step_of_lists(
    queries: Int64[Tensor, " list"],
    lists: Int64[Tensor, "list candidate"],
    embeddings: Float[Tensor, "item dim"],
) -> TrainingStep:
    """A step of lists whose first column is the positive."""
    length = lists.shape[1]
    number = torch.arange(len(lists)).repeat_interleave(length)
    is_negative = torch.arange(length).repeat(len(lists)) > 0
    return make_step(queries.repeat_interleave(length), lists.flatten(), is_negative, number, embeddings)


def make_step(
    queries: Int64[Tensor, " pair"],
    gallery: Int64[Tensor, " pair"],
    is_negative: Bool[Tensor, " pair"],
    list_keys: Int64[Tensor, " pair"],
    embeddings: Float[Tensor, "item dim"],
) -> TrainingStep:
    """A step of these pairs with their first-stage distances; equal adjacent `list_keys` make a list."""
    _, number = torch.unique_consecutive(list_keys, return_inverse=True)
    distances = exact_pair_distances(embeddings, embeddings, queries, gallery)
    return TrainingStep(queries, gallery, is_negative, number, distances)


def reorder(lists: CandidateLists, order: Int64[Tensor, "anchor kept"]) -> CandidateLists:
    """The candidates at these places (-1 = none), with their first-stage distances: margins keep their meaning."""
    is_there = order >= 0
    items, distances = (column.gather(1, order.clamp(min=0)) for column in (lists.items, lists.distances))
    return CandidateLists(
        lists.query_items, torch.where(is_there, items, -1), torch.where(is_there, distances, torch.inf)
    )
