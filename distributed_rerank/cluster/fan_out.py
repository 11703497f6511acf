"""Spread calls over a fixed group of Ray actors: bounded in flight, worker death survived, errors raised
here. Layer 4.

Every call must be repeatable: a call whose worker died runs again on its successor. Results therefore carry
the number of their block, and come in any order.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from distributed_rerank.cluster.session import Session
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime import logs

T = TypeVar("T")

_RETRIES = 3
"""A call that kills its worker this many times more is an error of the call, not of the machine."""


class _Host:
    """An actor around one object of a plain class.

    The object is made at the first call, so that an error of its constructor reaches the driver like that of any
    call. What it is made from comes with every call: were it the actor's own arguments, a successor whose arguments
    were lost with a node could not start, or would wait for them.
    """

    def __init__(self) -> None:
        logs.configure_worker()
        self._object: Any = None

    def call(self, made_from: list[ray.ObjectRef], method: str, *arguments: Any) -> Any:
        if self._object is None:
            worker_class, own_arguments = ray.get(made_from[0])
            fetched = [ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in own_arguments]
            self._object = worker_class(*fetched)
        return getattr(self._object, method)(*arguments)


@dataclass(frozen=True)
class Worker:
    """An actor that `start_workers` made."""

    actor: Any
    """Ray's handle; its own types do not know the methods."""
    made_from: list[ray.ObjectRef]
    """The class of the actor's object and its arguments; in a list, or Ray would fetch them for every call."""

    def call(self, method: str, *arguments: Any, num_returns: int = 1) -> Any:
        """The reference of what the method of the actor's object will return, or `num_returns` of them. References
        among `arguments` arrive as their values."""
        return self.actor.call.options(num_returns=num_returns).remote(self.made_from, method, *arguments)


@contextmanager
def start_workers(session: Session, worker_class: type, *arguments: Any) -> Iterator[list[Worker]]:
    """`session.num_workers` actors of a plain class, each made with `arguments`; killed when the block is
    left.

    Object references among `arguments` are fetched by the worker; the caller keeps them alive as long as the
    workers, because a restarted one fetches them again.
    """
    options: dict[str, Any] = {
        "num_cpus": session.cpus_per_worker,
        "num_gpus": 1 if session.use_gpu else 0,
        "max_restarts": -1,
        "max_task_retries": _RETRIES,
    }
    host: Any = ray.remote(**options)(_Host)
    made_from = [ray.put((worker_class, arguments))]
    workers = [Worker(host.remote(), made_from) for _ in range(session.num_workers)]
    try:
        yield workers
    finally:
        for worker in workers:
            ray.kill(worker.actor)


def fan_out(
    workers: list[Worker],
    submit: Callable[[Worker, T], ray.ObjectRef],
    tasks: Iterable[tuple[int, T]],
    *,
    in_flight: int = 2,
) -> Iterator[tuple[int, Any]]:
    """Results of numbered `tasks` as they complete, as (number, value of the reference that `submit`
    returned).

    At most `in_flight` calls wait at a worker: one is computed while the next one's arguments arrive. A
    BadInput raised in a worker is raised here as BadInput; any other error of a call as Ray's RayTaskError.
    """
    todo = iter(tasks)
    pending: dict[ray.ObjectRef, tuple[int, Worker]] = {}

    def give(worker: Worker) -> None:
        for number, task in itertools.islice(todo, 1):
            pending[submit(worker, task)] = (number, worker)

    for _ in range(in_flight):
        for worker in workers:
            give(worker)
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        number, worker = pending.pop(ready[0])
        give(worker)
        with _bad_input_raised():
            result = ray.get(ready[0])
        yield number, result


@contextmanager
def _bad_input_raised() -> Iterator[None]:
    """A BadInput that a worker raised arrives as it was, one line, instead of inside Ray's error with its
    trace."""
    try:
        yield
    except RayTaskError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, BadInput) and not isinstance(cause, RayTaskError):
                raise BadInput(str(cause)) from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise
