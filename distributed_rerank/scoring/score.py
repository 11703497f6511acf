"""Pairs to logits: every image is decoded and encoded once, then pairs are scored from the encodings."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.decoding import decode
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.runtime import logs
from distributed_rerank.runtime.devices import InferenceThreads, array_of, pick_device, tensor_of
from distributed_rerank.runtime.gpu import Copied, Copier, MicroBatch, errors_in_one_line
from distributed_rerank.runtime.profiling import traced
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring.rounds import Encoded, EncodeTask, PairTask, ScoredBlock, Scores, Scoring
from distributed_rerank.tensors import sharding

_THREADS_ON_GPU = 4
"""While some read images or gather encodings on the CPU, another keeps the GPU at work. On an H100 two to six score the
same 12,300 pairs/s; eight do less."""


def score_blocks(scoring: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
    """Score the blocks in this process, one call after the other."""
    work, counters = scoring.work, scoring.counters
    scorer = Scorer(copy.deepcopy(scoring.model), work)
    blocks_per_call = work.score_blocks_per_call(scorer.device.type == "cuda")
    for this_round in scoring.rounds(work.encoding_gb * 10**9):
        with counters.timed("encode"):
            this_round.add_encodings(map(scorer.encode, this_round.encode_tasks()))
        with counters.timed("score"):
            for numbers, arguments in this_round.score_calls(blocks_per_call):
                with logs.about(block=numbers):
                    scores = scorer.score(*arguments)
                yield from this_round.scored(numbers, scores)
            arguments = ()  # or its arrays would stay in memory beside those of the next round


class Scorer:
    """A pairwise model on the device of this process. A plain class: Ray makes actors from it."""

    def __init__(self, model: PairwiseModel, work: WorkConfig) -> None:
        """Takes the model over: it is moved, and its backbone cast to the format it computes in."""
        self.device = pick_device()
        is_gpu = self.device.type == "cuda"
        self._decode_threads = work.decode_threads_for(is_gpu)
        n_pairs = work.pairs_per_batch or scoring_plan.pairs_per_batch(model.gflop_per_pair(), is_gpu)
        self._batch = MicroBatch(n_pairs, "--pairs-per-batch")
        self._to_device = Copier(self.device)
        self._model = model.prepare_for_inference(self.device)
        self._computed_with = model.extractor.computed_with(self.device)
        self._threads = InferenceThreads(max(work.threads_per_worker, _THREADS_ON_GPU if is_gpu else 1))
        # Threads that launch a GPU's kernels at the same time wait for Python's lock between any two of them.
        self._launching = threading.Lock() if is_gpu else nullcontext()

    def encode(self, task: EncodeTask) -> tuple[np.ndarray, Encoded]:
        """Encodings of the readable images of the task, one array row each, and which images they are."""
        parts = self._threads.map(self._encode_batch, zip(task.items, task.refs, strict=True))
        items = [item for _, encoded in parts for item in encoded.items]
        rejects = {item: reject for _, encoded in parts for item, reject in encoded.rejects.items()}
        return np.concatenate([array for array, _ in parts]), Encoded(items, rejects, self._computed_with)

    def _encode_batch(self, batch: tuple[np.ndarray, list[ImageRef]]) -> tuple[np.ndarray, Encoded]:
        items, refs = batch
        decoded = decode(refs, self._model.transform, threads=self._decode_threads)
        rejects = dict(zip(np.delete(items, decoded.kept).tolist(), decoded.rejects, strict=True))
        if decoded.kept:
            with errors_in_one_line("--encode-batch"):
                encodings = self._model.encode(self._to_device(decoded.pixels))
        else:
            encodings = torch.empty((0, *self._model.encoding_shape), dtype=self._model.encoding_dtype)
        return array_of(encodings), Encoded(items[decoded.kept].tolist(), rejects, self._computed_with)

    def score(self, tasks: Sequence[PairTask], first_rows: Int64[np.ndarray, " array"], *arrays: np.ndarray) -> Scores:
        """Logits of the pairs of each task, a micro-batch at a time; the arrays hold rows from `first_rows` on.

        No micro-batch has pairs of two tasks: logits have the same bits whatever is scored in one call.
        """
        with traced("score"):
            if len(tasks) > 1:  # each thread takes whole tasks
                logits = self._threads.map(partial(self._score_task, first_rows, arrays), tasks)
                return Scores(logits, self._computed_with)
            pairs = self._gather(first_rows, arrays, tasks[0])
            parts = self._threads.map(partial(self._batch.run, pairs.score), self._micro_batches(tasks[0]))
            return Scores([self._joined(parts).on_host().numpy()], self._computed_with)

    def _score_task(
        self, first_rows: Int64[np.ndarray, " array"], arrays: Sequence[np.ndarray], task: PairTask
    ) -> Float32[np.ndarray, " pair"]:
        pairs = self._gather(first_rows, arrays, task)
        with self._launching:
            logits = self._joined(list(map(partial(self._batch.run, pairs.score), self._micro_batches(task))))
        with errors_in_one_line("--pairs-per-batch"):
            return logits.on_host().numpy()  # only here does the host wait for a GPU

    def _joined(self, parts: Sequence[list[Tensor]]) -> Copied:
        """The logits of a task, on their way to the host."""
        with errors_in_one_line("--pairs-per-batch"):
            return self._to_device.to_host(torch.cat([torch.empty(0, device=self.device), *chain.from_iterable(parts)]))

    def _micro_batches(self, task: PairTask) -> list[slice]:
        return [slice(*part) for part in sharding.blocks(len(task.queries), self._batch.size)]

    def _gather(
        self, first_rows: Int64[np.ndarray, " array"], arrays: Sequence[np.ndarray], task: PairTask
    ) -> "_PairsOnDevice":
        """The task on the device: its images are gathered on the host from their arrays, then copied at once."""
        # [image]: the distinct rows of the task, ascending; [2, pair]: where each query and candidate is among them.
        rows, places = torch.stack([tensor_of(task.queries), tensor_of(task.candidates)]).unique(return_inverse=True)
        dtype = self._model.encoding_dtype
        images = self._to_device.host_memory((len(rows), *self._model.encoding_shape), dtype)
        # [array + 1]: the rows of one array stand together in `rows`; where those of each begin, and the end.
        bounds = [*torch.searchsorted(rows, tensor_of(first_rows)).tolist(), len(rows)]
        for array, first, start, stop in zip(arrays, first_rows.tolist(), bounds[:-1], bounds[1:], strict=True):
            # `index_select` copies whole rows; indexing would copy number by number.
            torch.index_select(tensor_of(array, dtype), 0, rows[start:stop] - first, out=images[start:stop])
        with errors_in_one_line("--queries-per-block"):
            parts = (images, places, tensor_of(task.distances))
            return _PairsOnDevice(self._model, *map(self._to_device.to_device, parts))


@dataclass(frozen=True)
class _PairsOnDevice:
    """The pairs of a task with the encodings of their images, on their way to the device."""

    model: PairwiseModel
    images: Copied
    """Encodings [image, ...]."""
    places: Copied
    """Int64[2, pair]: the query and the candidate of each pair, as rows of `images`."""
    distances: Copied
    """Float32[pair]."""

    def score(self, pairs: slice) -> Float32[Tensor, " _"]:
        """Logits of some pairs, on the device."""
        images, places = self.images.on_device(), self.places.on_device()
        query, candidate = (images.index_select(0, rows) for rows in places[:, pairs])
        return self.model(query, candidate, self.distances.on_device()[pairs]).float()
