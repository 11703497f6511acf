"""Scoring on Ray: encodings stay in the object store, where every worker of a node reads them without a copy.
Layer 4."""

import copy
from collections.abc import Iterable, Iterator, Sequence

import ray

from distributed_rerank.cluster.fan_out import Worker, fan_out, start_workers
from distributed_rerank.cluster.monitoring import with_prometheus_counters
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.scoring.plan import ScorePlan
from distributed_rerank.scoring.score import (
    Backend,
    Encoded,
    EncodeTask,
    Images,
    PairTask,
    ScoredBlock,
    Scorer,
    Scores,
    ScoringCounters,
    run_rounds,
)

_SHARE_OF_STORE = 0.5
"""Encodings may take this part of the object store; beyond it Ray would write them to disk."""


def score(
    plan: ScorePlan,
    numbers: Sequence[int],
    images: Images,
    model: PairwiseModel,
    work: WorkConfig,
    counters: ScoringCounters,
    *,
    session: Session,
) -> Iterator[tuple[int, ScoredBlock]]:
    """`procedures.scoring.score` on the session's workers, blocks as they complete."""
    shipped = ray.put(copy.deepcopy(model).cpu())
    with start_workers(session, Scorer, shipped, work) as workers:
        store = int(session.object_store_bytes * _SHARE_OF_STORE)
        backend = Backend(
            encode=lambda tasks: _encode(workers, tasks),
            score=lambda calls: _score(workers, calls),
            n_workers=len(workers),
            max_bytes=min(int(work.encoding_gb * 10**9), store),
            blocks_per_call=work.score_blocks_per_call(session.use_gpu),
        )
        blocks = run_rounds(plan, numbers, images, model.bytes_per_image, backend, counters)
        yield from with_prometheus_counters(blocks, counters)


def _encode(workers: list[Worker], tasks: Sequence[EncodeTask]) -> Iterator[tuple[ray.ObjectRef, Encoded]]:
    """Only the description of each array comes to the driver; the array is left where it was made."""
    arrays: dict[int, ray.ObjectRef] = {}

    def submit(worker: Worker, task: tuple[int, EncodeTask]) -> ray.ObjectRef:
        number, images = task
        arrays[number], encoded = worker.call("encode", images, num_returns=2)
        return encoded

    for number, encoded in fan_out(workers, submit, ((number, (number, task)) for number, task in enumerate(tasks))):
        yield arrays.pop(number), encoded


def _score(
    workers: list[Worker], calls: Iterable[tuple[int, tuple[list[PairTask], list[ray.ObjectRef]]]]
) -> Iterator[tuple[int, Scores]]:
    def submit(worker: Worker, call: tuple[list[PairTask], list[ray.ObjectRef]]) -> ray.ObjectRef:
        tasks, arrays = call
        return worker.call("score", tasks, *arrays)

    yield from fan_out(workers, submit, calls)
