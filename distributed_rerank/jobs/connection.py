"""The executors of a job: a Ray cluster, or with --num-workers 0 this process alone, where ray is not imported."""

from collections.abc import Iterator
from contextlib import contextmanager

from distributed_rerank.config.cluster import ClusterConfig, RetryConfig
from distributed_rerank.executors import Executors
from distributed_rerank.training.run import fit
from distributed_rerank.training.task import Fit


@contextmanager
def executors_for(cluster: ClusterConfig, retry: RetryConfig | None = None) -> Iterator[tuple[Executors, Fit]]:
    """What computes embeddings, lists and logits, and what trains. Ray is started or joined at the first use.

    Wrong input is so found before Ray starts, and a run with nothing left to do starts none.
    """
    if cluster.num_workers == 0:
        yield Executors(), fit
        return
    from distributed_rerank.cluster.executors import connect_when_needed, executors_on
    from distributed_rerank.cluster.training import fit_on

    with connect_when_needed(cluster) as session:
        yield executors_on(session), fit_on(session, retry or RetryConfig())
