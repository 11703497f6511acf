"""Scoring on Ray: encodings stay in the object store, where every worker of a node reads them without a copy."""

import copy
from collections.abc import Callable, Iterator

import ray

from distributed_rerank.cluster.fan_out import fan_out, start_workers
from distributed_rerank.cluster.monitoring import ScoringMetrics
from distributed_rerank.cluster.session import Session
from distributed_rerank.scoring.rounds import ScoredBlock, Scoring
from distributed_rerank.scoring.score import Scorer

_SHARE_OF_STORE = 0.5
"""Encodings may take this part of the object store; beyond it Ray would write them to disk."""


def score_blocks(connect: Callable[[], Session], scoring: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
    """Score the blocks on the session's workers; they come as they complete."""
    session = connect()
    work, counters, n_workers = scoring.work, scoring.counters, session.num_workers
    shipped = ray.put(copy.deepcopy(scoring.model).cpu())
    blocks_per_call = work.score_blocks_per_call(session.use_gpu)
    metrics = ScoringMetrics()
    with start_workers(session, Scorer, shipped, work) as workers:
        for this_round in scoring.rounds(min(work.encoding_gb * 10**9, session.object_store_bytes * _SHARE_OF_STORE)):
            with counters.timed("encode", n_workers):
                tasks = ((None, (task,)) for task in this_round.encode_tasks(n_workers))
                encoded = fan_out(workers, "encode", tasks, leaves_first=True)
                this_round.add_encodings(result for _, result in encoded)
            with counters.timed("score", n_workers):
                for numbers, scores in fan_out(workers, "score", this_round.score_calls(blocks_per_call)):
                    for block in this_round.scored(numbers, scores):
                        metrics.count_block(counters)
                        yield block
