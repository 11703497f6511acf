"""The executors of a job: a Ray cluster, or with --num-workers 0 this process alone, where ray is not imported."""

from collections.abc import Iterator
from contextlib import contextmanager

from distributed_rerank.config.cluster import ClusterConfig, RetryConfig
from distributed_rerank.executors import Executors
from distributed_rerank.training.run import fit
from distributed_rerank.training.task import Fit


@contextmanager
def executors_for(cluster: ClusterConfig, retry: RetryConfig | None = None) -> Iterator[tuple[Executors | None, Fit]]:
    """Who computes embeddings, lists and logits (None = this process), and the function that trains.

    Ray is started or joined at the first use: wrong input is found before, and a run with nothing left to do starts
    none.
    """
    if cluster.num_workers == 0:
        yield None, fit
        return
    from distributed_rerank.cluster.executors import RayExecutors, connect_when_needed
    from distributed_rerank.cluster.training import fit_on

    with connect_when_needed(cluster) as session:
        yield RayExecutors(session), fit_on(session, retry or RetryConfig())
