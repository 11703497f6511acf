"""What is trained on, decided before any image is opened: a pure, seeded function of lists, labels and epoch.
Layer 3.

Every worker makes the same plan and takes its share of each step, so a plan does not depend on how many
workers there are, and a resumed run trains on what the uninterrupted one would have.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.samplers import BalanceSampler
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.tensors.candidate_mining import draw_lists, filter_negatives
from distributed_rerank.tensors.distances import exact_pair_distances
from distributed_rerank.tensors.knn import Neighbours
from distributed_rerank.tensors.mining import hard_pairs
from distributed_rerank.tensors.sharding import rank_share


@dataclass(frozen=True)
class Step:
    """The pairs of one optimizer step; pairs of one list lie together and lists are numbered 0, 1, ... in
    order."""

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
        """What the step's loss is a mean over: lists for list losses, else pairs."""
        return self.n_lists() if is_list_loss(loss) else len(self)

    def take(self, start: int, stop: int) -> "Step":
        """Pairs start to stop - 1; their lists are numbered from 0 again."""
        part = {name: column[start:stop] for name, column in self.columns().items()}
        if start < stop:
            part["list_of_pair"] = part["list_of_pair"] - part["list_of_pair"][0]
        return Step(**part)

    def columns(self) -> dict[str, Tensor]:
        """The columns that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def is_list_loss(loss: str) -> bool:
    """Whether the loss of a pair depends on the others of its list."""
    return loss in ("listwise", "ranknet", "margin")


def share_of(step: Step, number: int, n_shares: int, is_by_list: bool) -> Step:
    """Share `number` of `n_shares`: contiguous pairs, or whole lists; the shares cover the step and may be
    empty."""
    start, stop = rank_share(step.n_lists() if is_by_list else len(step), number, n_shares)
    if is_by_list:
        start, stop = torch.searchsorted(step.list_of_pair, torch.tensor([start, stop])).tolist()
    return step.take(start, stop)


def seed_of(*numbers: int) -> int:
    """A seed mixed from non-negative integers; the same on every machine, different for every other tuple."""
    state = np.random.SeedSequence(list(numbers)).generate_state(2, np.uint32)
    return int(state[0]) << 31 | int(state[1]) >> 1


def plan_digest(steps: Iterable[Step]) -> str:
    """A digest of every pair of the steps, in order."""
    digest = hashlib.sha256()
    for step in steps:
        digest.update(len(step).to_bytes(8, "little"))
        for column in step.columns().values():
            digest.update(np.ascontiguousarray(column.numpy()).tobytes())
    return digest.hexdigest()


def plan_batches(
    items: Int64[np.ndarray, " trained"],
    labels: Int64[np.ndarray, " item"],
    embeddings: Float[Tensor, "item dim"],
    config: TrainingConfig,
    epoch: int,
) -> list[Step]:
    """OML's recipe: balanced batches of `items`, in each the hard pairs by first-stage distance.

    A pair's list is that of its first item. `labels` and `embeddings` are those of all items.
    """
    sampler = BalanceSampler(labels[items], config.n_labels, config.n_instances, config.seed)
    steps = []
    for batch in sampler.batches(epoch):
        chosen = tensor_of(np.unique(items[batch]))
        first, second, is_negative = hard_pairs(embeddings[chosen], tensor_of(labels)[chosen])
        order = first.argsort(stable=True)
        queries, gallery = chosen[first[order]], chosen[second[order]]
        steps.append(make_step(queries, gallery, is_negative[order], queries, embeddings))
    return steps


def plan_whole_batches(
    items: Int64[np.ndarray, " trained"],
    labels: Int64[np.ndarray, " item"],
    embeddings: Float[Tensor, "item dim"],
    config: TrainingConfig,
    epoch: int,
) -> list[Step]:
    """Balanced batches of `items` in which each image's list is the rest of the batch.

    With a listwise loss on distances this is supervised contrastive training (Khosla et al. 2020).
    """
    sampler = BalanceSampler(labels[items], config.n_labels, config.n_instances, config.seed)
    steps = []
    for batch in sampler.batches(epoch):
        chosen = tensor_of(np.unique(items[batch]))
        own, other = (~torch.eye(len(chosen), dtype=torch.bool)).nonzero(as_tuple=True)
        queries, gallery = chosen[own], chosen[other]
        is_negative = tensor_of(labels)[queries] != tensor_of(labels)[gallery]
        steps.append(make_step(queries, gallery, is_negative, queries, embeddings))
    return steps


def plan_lists(
    anchors: CandidateLists,
    labels: Int64[np.ndarray, " item"],
    sequences: Int64[np.ndarray, " item"],
    embeddings: Float[Tensor, "item dim"],
    config: TrainingConfig,
    epoch: int,
) -> list[Step]:
    """Lists of one positive and `n_negatives` negatives of the anchors that have both.

    Negatives are drawn from the anchor's own candidates, so they are distributed like the pairs that are
    re-ranked later; `tensors.candidate_mining` says how. The anchors come in random order, each once, and
    again from the start while `steps_per_epoch` asks for more. `labels`, `sequences` and `embeddings` are
    those of all items.
    """
    items = tensor_of(anchors.query_items)
    neighbours = Neighbours(tensor_of(anchors.items), tensor_of(anchors.distances))
    own = torch.full((len(labels),), -1)
    own[items] = tensor_of(labels)[items]
    allowed, _ = filter_negatives(neighbours, items, own, config.filters)
    drawn: list[tuple[Tensor, Tensor]] = []
    wanted = None if config.steps_per_epoch is None else config.steps_per_epoch * config.lists_per_step
    while not drawn or (wanted is not None and sum(len(queries) for queries, _ in drawn) < wanted):
        generator = torch.Generator().manual_seed(seed_of(config.seed, epoch, len(drawn)))
        lists = draw_lists(
            neighbours, items, own, allowed, n_negatives=config.n_negatives, generator=generator,
            beyond_share=config.share_beyond, temperature=config.negative_temperature, sequences=tensor_of(sequences),
        )  # fmt: skip
        if not len(lists.rows):
            raise BadInput("no image has a positive and a negative candidate; raise --n-items or relax the filters")
        order = torch.randperm(len(lists.rows), generator=generator)
        drawn.append((items[lists.rows[order]], lists.items[order]))
    queries, chosen = (torch.cat(column)[:wanted] for column in zip(*drawn, strict=True))
    return [
        step_of_lists(some_queries, some_lists, embeddings)
        for some_queries, some_lists in zip(
            queries.split(config.lists_per_step), chosen.split(config.lists_per_step), strict=True
        )
    ]


def step_of_lists(
    queries: Int64[Tensor, " list"],
    lists: Int64[Tensor, "list candidate"],
    embeddings: Float[Tensor, "item dim"],
) -> Step:
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
) -> Step:
    """A step of these pairs, those of one list already together, with their first-stage distances."""
    _, number = torch.unique_consecutive(list_keys, return_inverse=True)
    return Step(queries, gallery, is_negative, number, exact_pair_distances(embeddings, embeddings, queries, gallery))
