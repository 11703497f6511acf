"""Pairs to logits: every image is decoded and encoded once, then pairs are scored from the encodings. Layer
3.

A run goes in rounds. A round encodes the images of as many score blocks as fit in a byte budget, then scores
those blocks. Where the encodings live and who computes is the business of the two functions of a `Backend`.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.begun import ComputedWith
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.decoding import decode
from distributed_rerank.data.rejects import Reject
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.runtime.devices import InferenceThreads, array_of, pick_device, tensor_of
from distributed_rerank.runtime.gpu import Copier, MicroBatch, errors_in_one_line
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring.plan import ScoreBlock, ScorePlan
from distributed_rerank.tensors import sharding

_BYTES_PER_TASK = 32 * 2**20
"""About the encodings that one call makes: few references to hand around, short enough to share out."""

_LANES_OF_GPU = 2
"""While one lane reads images or gathers encodings on the CPU, the other keeps the GPU at work."""


@dataclass(frozen=True)
class Encoded:
    """What an encode call says about its images, whose encodings lie in an array beside it."""

    places: list[int]
    """Places of the images in the array's rows."""
    rejects: dict[int, Reject]
    """The images that could not be read, by place."""
    computed_with: ComputedWith


@dataclass(frozen=True)
class EncodeTask:
    """Whole image batches that one call encodes."""

    places: list[range]
    refs: list[list[ImageRef]]


@dataclass(frozen=True)
class PairTask:
    """The readable pairs of a score block, in order of (query, candidate), as rows of the block's own image
    table."""

    sources: Int64[np.ndarray, " image"]
    """Which of the arrays that come with the call holds each image of the table."""
    rows: Int64[np.ndarray, " image"]
    """And in which of its rows."""
    queries: Int64[np.ndarray, " pair"]
    candidates: Int64[np.ndarray, " pair"]
    distances: Float32[np.ndarray, " pair"]


@dataclass(frozen=True)
class ScoredBlock:
    """Logits of a score block, NaN where there is no pair to score, and its images that could not be read."""

    logits: Float32[np.ndarray, "query top_n"]
    rejects: list[Reject]
    computed_with: frozenset[ComputedWith]
    """Of the workers that encoded its round and that scored it."""


@dataclass(frozen=True)
class Scores:
    """What a score call returns: the logits of the pairs of each task."""

    logits: list[Float32[np.ndarray, " _"]]
    computed_with: ComputedWith


@dataclass
class ScoringCounters:
    """What a run has done; filled by the step while it works."""

    images_decoded: int = 0
    encodings_computed: int = 0
    encodings_repeated: int = 0
    """Computed again in a later round."""
    pairs_scored: int = 0
    _seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "score": 0.0, "n_workers": 0})
    _seen: set[int] = field(default_factory=set, repr=False)

    def add(self, encoded: Encoded) -> None:
        """Count the result of one encode call."""
        self.images_decoded += len(encoded.places) + len(encoded.rejects)
        self.encodings_computed += len(encoded.places)
        self.encodings_repeated += sum(place in self._seen for place in encoded.places)
        self._seen.update(encoded.places)

    def add_seconds(self, encode: float, score: float, n_workers: int) -> None:
        """Count the time of one round."""
        self._seconds["encode"] += encode
        self._seconds["score"] += score
        self._seconds["n_workers"] = n_workers

    def seconds(self) -> dict[str, float]:
        """Seconds spent on images (read and encoded) and on pairs, and how many workers did it."""
        return {name: round(value, 4) for name, value in self._seconds.items()}

    def counts(self) -> dict[str, int]:
        """The counters by name."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


class Scorer:
    """A pairwise model on the device of this process. A plain class: Ray makes actors from it."""

    def __init__(self, model: PairwiseModel, work: WorkConfig) -> None:
        """Takes the model over: it is moved, and its backbone cast to the format it computes in."""
        self.device = pick_device()
        self._work = work
        is_gpu = self.device.type == "cuda"
        n_pairs = work.pairs_per_batch or scoring_plan.pairs_per_batch(model.gflop_per_pair(), is_gpu)
        self._batch = MicroBatch(n_pairs, "--pairs-per-batch")
        self._to_device = Copier(self.device)
        self._model = model.prepare_for_inference(self.device)
        self._computed_with = model.extractor.computed_with(self.device)
        self._lanes = InferenceThreads(max(work.threads_per_worker, _LANES_OF_GPU if is_gpu else 1))

    def encode(self, task: EncodeTask) -> tuple[np.ndarray, Encoded]:
        """Encodings of the readable images of the task, one array row each, and which images they are."""
        parts = self._lanes.map(self._encode_batch, zip(task.places, task.refs, strict=True))
        places = [place for _, encoded in parts for place in encoded.places]
        rejects = {place: reject for _, encoded in parts for place, reject in encoded.rejects.items()}
        return np.concatenate([array for array, _ in parts]), Encoded(places, rejects, self._computed_with)

    def _encode_batch(self, batch: tuple[range, list[ImageRef]]) -> tuple[np.ndarray, Encoded]:
        places, refs = batch
        decoded = decode(refs, self._model.transform, threads=self._work.decode_threads)
        unreadable = sorted(set(range(len(refs))) - set(decoded.kept))
        rejects = {places[at]: reject for at, reject in zip(unreadable, decoded.rejects, strict=True)}
        if decoded.kept:
            with errors_in_one_line("--encode-batch"):
                encodings = self._model.encode(self._to_device(decoded.pixels))
        else:
            encodings = torch.empty((0, *self._model.encoding_shape), dtype=self._model.encoding_dtype)
        return array_of(encodings), Encoded([places[at] for at in decoded.kept], rejects, self._computed_with)

    def score(self, tasks: Sequence[PairTask], *encodings: np.ndarray) -> Scores:
        """The logits of the pairs of each task, a micro-batch at a time.

        No micro-batch has pairs of two tasks: logits have the same bits whatever is scored in one call.
        """
        if len(tasks) == 1:
            logits = [self._score_task(tasks[0], encodings, self._lanes.map)]
        else:
            logits = self._lanes.map(lambda task: self._score_task(task, encodings, map), tasks)
        return Scores(logits, self._computed_with)

    def _score_task(
        self, task: PairTask, encodings: Sequence[np.ndarray], each: Callable[..., Iterable[list[np.ndarray]]]
    ) -> Float32[np.ndarray, " pair"]:
        """The logits of the task, whose micro-batches are computed by `each`: `map`, or that of the lanes."""
        images = self._table(task, encodings)
        distances, queries, candidates = (
            self._to_device(torch.from_numpy(column.copy()))
            for column in (task.distances, task.queries, task.candidates)
        )

        def score_pairs(pairs: slice) -> Float32[np.ndarray, " pair"]:
            logits = self._model(images[queries[pairs]], images[candidates[pairs]], distances[pairs])
            return logits.float().cpu().numpy()

        def score_part(part: tuple[int, int]) -> list[Float32[np.ndarray, " pair"]]:
            return self._batch.run(score_pairs, slice(*part))

        parts = each(score_part, sharding.blocks(len(queries), self._batch.size))
        return np.concatenate([np.empty(0, np.float32), *(rows for part in parts for rows in part)])

    def _table(self, task: PairTask, encodings: Sequence[np.ndarray]) -> Tensor:
        """The images of one score block on the device: gathered on the host from their arrays, then copied at once."""
        dtype = self._model.encoding_dtype
        table = torch.empty((len(task.rows), *self._model.encoding_shape), dtype=dtype)
        for source in np.unique(task.sources):
            places = np.flatnonzero(task.sources == source)
            table[torch.from_numpy(places)] = tensor_of(encodings[source], dtype)[torch.from_numpy(task.rows[places])]
        with errors_in_one_line("--queries-per-block"):
            return self._to_device(table)


@dataclass(frozen=True)
class Backend:
    """Who computes. Encodings are passed on as opaque handles: arrays in one process, references on Ray."""

    encode: Callable[[Sequence[EncodeTask]], Iterator[tuple[Any, Encoded]]]
    """Handles and descriptions, in any order."""
    score: Callable[[Iterable[tuple[int, tuple[list[PairTask], list[Any]]]]], Iterator[tuple[int, Scores]]]
    """Logits of the tasks of each numbered call, the calls in any order."""
    n_workers: int
    max_bytes: int
    """Encodings that may exist at a time."""
    blocks_per_call: int = 1
    """Score blocks whose tasks come in one call."""


Images = Callable[[np.ndarray], list[ImageRef]]
Score = Callable[
    [ScorePlan, Sequence[int], Images, PairwiseModel, WorkConfig, ScoringCounters], Iterator[tuple[int, ScoredBlock]]
]
"""A step: the named blocks of the plan, scored, in any order; images are looked up by item number."""


def score(
    plan: ScorePlan,
    numbers: Sequence[int],
    images: Images,
    model: PairwiseModel,
    work: WorkConfig,
    counters: ScoringCounters,
) -> Iterator[tuple[int, ScoredBlock]]:
    """The step in one process."""
    scorer = Scorer(copy.deepcopy(model), work)
    backend = Backend(
        encode=lambda tasks: (scorer.encode(task) for task in tasks),
        score=lambda calls: ((number, scorer.score(tasks, *arrays)) for number, (tasks, arrays) in calls),
        n_workers=1,
        max_bytes=int(work.encoding_gb * 10**9),
        blocks_per_call=work.score_blocks_per_call(scorer.device.type == "cuda"),
    )
    yield from run_rounds(plan, numbers, images, model.bytes_per_image, backend, counters)


def run_rounds(
    plan: ScorePlan,
    numbers: Sequence[int],
    images: Images,
    bytes_per_image: int,
    backend: Backend,
    counters: ScoringCounters,
) -> Iterator[tuple[int, ScoredBlock]]:
    """Encode and score round by round. The encodings of a round are dropped before the next one begins."""
    for now in plan.rounds(numbers, max(1, backend.max_bytes // bytes_per_image)):
        yield from _run_round(plan, now, images, bytes_per_image, backend, counters)


def _run_round(
    plan: ScorePlan, now: list[int], images: Images, bytes_per_image: int, backend: Backend, counters: ScoringCounters
) -> Iterator[tuple[int, ScoredBlock]]:
    sources, rows = (np.full(len(plan.items), -1, np.int64) for _ in range(2))
    handles: list[Any] = []
    rejects: dict[int, Reject] = {}
    encoders: set[ComputedWith] = set()
    started = time.perf_counter()
    for handle, encoded in backend.encode(_encode_tasks(plan, now, images, bytes_per_image, backend.n_workers)):
        sources[encoded.places], rows[encoded.places] = len(handles), np.arange(len(encoded.places))
        handles.append(handle)
        rejects |= encoded.rejects
        encoders.add(encoded.computed_with)
        counters.add(encoded)
    encoded_at = time.perf_counter()
    cuts = sharding.blocks(len(now), backend.blocks_per_call)
    calls = {number: [plan.blocks[at] for at in now[slice(*cut)]] for number, cut in enumerate(cuts)}
    tasks = ((number, _pair_tasks(blocks, sources, rows, handles)) for number, blocks in calls.items())
    for number, scored in backend.score(tasks):
        computed_with = frozenset({*encoders, scored.computed_with})
        for at, block, logits in zip(now[slice(*cuts[number])], calls[number], scored.logits, strict=True):
            counters.pairs_scored += len(logits)
            unreadable = [rejects[place] for place in block.places().tolist() if place in rejects]
            yield at, ScoredBlock(_in_place(block, sources, logits), unreadable, computed_with)
    counters.add_seconds(encoded_at - started, time.perf_counter() - encoded_at, backend.n_workers)


def _encode_tasks(
    plan: ScorePlan, now: list[int], images: Images, bytes_per_image: int, n_workers: int
) -> list[EncodeTask]:
    """The round's image batches, several to a task: about 32 MiB of encodings, but enough tasks for all
    workers."""
    batches = plan.batches(now)
    most = max(1, _BYTES_PER_TASK // (bytes_per_image * plan.images_per_batch))
    size = min(most, max(1, len(batches) // (4 * n_workers)))
    tasks = []
    for start, stop in sharding.blocks(len(batches), size):
        places = [plan.batch_places(batch) for batch in batches[start:stop].tolist()]
        tasks.append(EncodeTask(places, [images(plan.items[place.start : place.stop]) for place in places]))
    return tasks


def _is_scored(block: ScoreBlock, sources: np.ndarray) -> Bool[np.ndarray, "query top_n"]:
    """Which pairs of the block exist and have both images."""
    query = sources[block.queries] >= 0
    return (block.candidates >= 0) & query[:, None] & (sources[block.candidates] >= 0)


def _pair_tasks(
    blocks: Sequence[ScoreBlock], sources: np.ndarray, rows: np.ndarray, handles: list[Any]
) -> tuple[list[PairTask], list[Any]]:
    """The tasks of the score blocks of one call, and the handles of the arrays that they read."""
    pairs = [_readable_pairs(block, sources) for block in blocks]
    images = [np.unique(np.concatenate([queries, candidates])) for queries, candidates, _ in pairs]
    used = np.unique(sources[np.concatenate(images)])
    tasks = [
        PairTask(
            sources=np.searchsorted(used, sources[places]),
            rows=rows[places],
            queries=np.searchsorted(places, queries),
            candidates=np.searchsorted(places, candidates),
            distances=distances,
        )
        for places, (queries, candidates, distances) in zip(images, pairs, strict=True)
    ]
    return tasks, [handles[source] for source in used]


def _readable_pairs(block: ScoreBlock, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the query and of the candidate of each pair that is scored, and their first-stage distance."""
    query, column = np.nonzero(_is_scored(block, sources))
    return block.queries[query], block.candidates[query, column], block.distances[query, column]


def _in_place(block: ScoreBlock, sources: np.ndarray, logits: np.ndarray) -> Float32[np.ndarray, "query top_n"]:
    """The logits at the places of their pairs; NaN elsewhere. A logit that is not finite is the model's
    fault."""
    if not np.isfinite(logits).all():
        raise BadInput("the pairwise model gives logits that are not finite; train it again, or with precision fp32")
    placed = np.full(block.candidates.shape, np.nan, np.float32)
    placed[_is_scored(block, sources)] = logits
    return placed
