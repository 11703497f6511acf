"""What a scoring run computes in which call, and how the results come together; who computes them is not said here.

A run goes in rounds: the images of some score blocks are encoded, then their pairs are scored from the encodings. An
image is a *row* of its round: rows count through all arrays of encodings, in the order in which they came.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.rejects import Reject
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.plan import ScoreBlock, ScorePlan
from distributed_rerank.storage.begun import ComputedWith
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import places_of

_BYTES_PER_TASK = 32 * 2**20
"""Roughly the encodings of one call: few references to hand around, short enough to share out."""


@dataclass(frozen=True)
class EncodeTask:
    """Whole image batches that one call encodes."""

    items: list[Int64[np.ndarray, " _"]]
    refs: list[list[ImageRef]]


@dataclass(frozen=True)
class Encoded:
    """Which images an encode call has read; their encodings are the rows of an array beside it, in this order."""

    items: list[int]
    rejects: dict[int, Reject]
    """The images that could not be read, by item."""
    computed_with: ComputedWith


@dataclass(frozen=True)
class PairTask:
    """The readable pairs of a score block in order of (query, candidate), images as rows of the round."""

    queries: Int64[np.ndarray, " pair"]
    candidates: Int64[np.ndarray, " pair"]
    distances: Float32[np.ndarray, " pair"]


@dataclass(frozen=True)
class Scores:
    """What a score call returns: the logits of the pairs of each task."""

    logits: list[Float32[np.ndarray, " _"]]
    computed_with: ComputedWith


@dataclass(frozen=True)
class ScoredBlock:
    """Logits of a score block, NaN where there is no pair to score, and its images that could not be read."""

    logits: Float32[Tensor, "query top_n"]
    rejects: list[Reject]
    computed_with: frozenset[ComputedWith]
    """Of the workers that encoded its round and that scored it."""


@dataclass
class ScoringCounters:
    """What a run has done; filled while it works."""

    images_decoded: int = 0
    encodings_computed: int = 0
    encodings_repeated: int = 0
    """Computed again in a later round."""
    pairs_scored: int = 0
    _seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "score": 0.0, "n_workers": 0})
    _seen: set[int] = field(default_factory=set, repr=False)

    def add(self, encoded: Encoded) -> None:
        """Count the result of one encode call."""
        self.images_decoded += len(encoded.items) + len(encoded.rejects)
        self.encodings_computed += len(encoded.items)
        self.encodings_repeated += sum(item in self._seen for item in encoded.items)
        self._seen.update(encoded.items)

    @contextmanager
    def timed(self, name: str, n_workers: int = 1) -> Iterator[None]:
        """Add the seconds that the block takes to those of `name`, encode or score."""
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started
        self._seconds["n_workers"] = n_workers

    def seconds(self) -> dict[str, float]:
        """Seconds spent on images (read and encoded) and on pairs, and how many workers did it."""
        return {name: round(value, 4) for name, value in self._seconds.items()}

    def counts(self) -> dict[str, int]:
        """The counters by name."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


@dataclass(frozen=True)
class Scoring:
    """What a run has to score: some blocks of a plan, whose items are those of the catalogue, with a model."""

    plan: ScorePlan
    numbers: list[int]
    """The blocks."""
    catalogue: Catalogue
    model: PairwiseModel
    work: WorkConfig
    counters: ScoringCounters = field(default_factory=ScoringCounters)

    def rounds(self, max_bytes: float) -> Iterator["Round"]:
        """Rounds of blocks, in order, whose encodings together take no more than `max_bytes`, or of one block."""
        for numbers in self.plan.rounds(self.numbers, int(max_bytes) // self.model.bytes_per_image):
            yield Round(self, numbers)


class Round:
    """Score blocks whose encodings fit in memory together."""

    def __init__(self, scoring: Scoring, numbers: list[int]) -> None:
        self._scoring, self._numbers = scoring, numbers
        self._arrays: list[Any] = []
        # The first row of each array, and the row behind the last.
        self._first_rows = [0]
        plan = scoring.plan
        batches = [np.empty(0, np.int64), *map(plan.batch, plan.batches(numbers).tolist())]
        # The round's images, ascending, and the row of each, -1 = not encoded. One more for what is no image.
        self._items = torch.from_numpy(np.sort(np.concatenate(batches)))
        self._rows = torch.full((len(self._items) + 1,), -1)
        self._rejects: dict[int, Reject] = {}
        self._computed_with: set[ComputedWith] = set()

    def encode_tasks(self, n_workers: int = 1) -> Iterator[EncodeTask]:
        """The round's image batches, several to a task: about 32 MiB of encodings, but enough tasks for all workers."""
        plan = self._scoring.plan
        batches = plan.batches(self._numbers)
        most = max(1, _BYTES_PER_TASK // (self._scoring.model.bytes_per_image * plan.images_per_batch))
        for start, stop in sharding.blocks(len(batches), min(most, max(1, len(batches) // (4 * n_workers)))):
            items = [plan.batch(number) for number in batches[start:stop].tolist()]
            yield EncodeTask(items, [self._scoring.catalogue.images(part) for part in items])

    def add_encodings(self, results: Iterable[tuple[Any, Encoded]]) -> None:
        """Take the results of all encode tasks, in any order: arrays, or references to arrays that lie elsewhere."""
        for array, encoded in results:
            first, stop = self._first_rows[-1], self._first_rows[-1] + len(encoded.items)
            items = torch.tensor(encoded.items, dtype=torch.int64)
            self._rows[places_of(self._items, items)] = torch.arange(first, stop)
            self._first_rows.append(stop)
            self._arrays.append(array)
            self._rejects |= encoded.rejects
            self._computed_with.add(encoded.computed_with)
            self._scoring.counters.add(encoded)

    def score_calls(self, blocks_per_call: int) -> Iterator[tuple[list[int], tuple[Any, ...]]]:
        """Numbers of some score blocks, and the arguments of `Scorer.score` for their pairs."""
        for start, stop in sharding.blocks(len(self._numbers), blocks_per_call):
            numbers = self._numbers[start:stop]
            tasks = [self._pair_task(self._scoring.plan.blocks[number]) for number in numbers]
            # [array]: the arrays that hold a row of these pairs. The array of a row is the last that starts before it.
            rows = np.concatenate([part for task in tasks for part in (task.queries, task.candidates)])
            used = np.unique(np.searchsorted(self._first_rows, rows, side="right") - 1)
            yield numbers, (tasks, np.array(self._first_rows)[used], *(self._arrays[number] for number in used))

    def scored(self, numbers: Sequence[int], scores: Scores) -> Iterator[tuple[int, ScoredBlock]]:
        """The score blocks of one call. Raises BadInput for a logit that is not finite."""
        computed_with = frozenset({*self._computed_with, scores.computed_with})
        for number, of_pairs in zip(numbers, scores.logits, strict=True):
            block = self._scoring.plan.blocks[number]
            if not np.isfinite(of_pairs).all():
                query, column = self._is_readable(block).nonzero()[int(np.isfinite(of_pairs).argmin())].tolist()
                ids, lists = self._scoring.catalogue.ids, block.lists
                pair = f"{ids[int(lists.query_items[query])]!r} and {ids[int(lists.items[query, column])]!r}"
                raise BadInput(
                    f"the pairwise model gives no finite logit of {pair} ({(~np.isfinite(of_pairs)).sum()} pairs of "
                    "their block); train it again, or with precision fp32"
                )
            is_readable = self._is_readable(block)
            placed = torch.full(is_readable.shape, torch.nan)
            placed[is_readable] = tensor_of(of_pairs)
            self._scoring.counters.pairs_scored += len(of_pairs)
            rejects = [self._rejects[item] for item in block.images().tolist() if item in self._rejects]
            yield number, ScoredBlock(placed, rejects, computed_with)

    def _pair_task(self, block: ScoreBlock) -> PairTask:
        # [pair]: the query, as a row of the block, and the column of its candidate; ascending.
        query, column = self._is_readable(block).nonzero(as_tuple=True)
        lists = block.lists
        queries, candidates = self._row_of(lists.query_items[query]), self._row_of(lists.items[query, column])
        return PairTask(queries.numpy(), candidates.numpy(), lists.distances[query, column].numpy())

    def _is_readable(self, block: ScoreBlock) -> Bool[Tensor, "query top_n"]:
        """Which pairs of the block exist and have both images."""
        lists = block.lists
        return (self._row_of(lists.query_items) >= 0)[:, None] & (self._row_of(lists.items) >= 0)

    def _row_of(self, items: Tensor) -> Tensor:
        """The row of each item; -1 = it has none."""
        return self._rows[places_of(self._items, items.long())]


@runtime_checkable
class ScoreExecutors(Protocol):
    """Score the blocks of a plan, in this process or elsewhere."""

    def score_blocks(self, scoring: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        """The scored blocks by number, in any order."""
        ...
