"""Spread calls over a fixed group of Ray actors: bounded in flight, worker death survived, errors raised here.

Every call must be repeatable: a call whose worker died runs again on its successor. Results come in any order, so each
has the key of its call with it.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from distributed_rerank.cluster.session import Session
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.runtime import logs

Key = TypeVar("Key")

logger = logging.getLogger(__name__)

_FIRST_S, _LEAST_S, _SLOWER = 1800.0, 120.0, 20.0
"""Seconds for the first result of all, and the least for any other; how much slower than the slowest is too slow."""
_RETRIES = 3
"""A call that kills its worker this many times more is an error of the call, not of the machine."""


class _Host:
    """An actor around one object of a plain class.

    The object is made at the first call, so that an error of its constructor reaches the driver like that of any call.
    Class and arguments are sent with every call: as actor arguments they could be lost with their node, and Ray could
    not restart the actor.
    """

    def __init__(self) -> None:
        logs.configure_worker()
        self._object: Any = None

    def call(self, made_from: list[ray.ObjectRef], about: dict[str, Any], method: str, *arguments: Any) -> Any:
        if self._object is None:
            worker_class, own_arguments = ray.get(made_from[0])
            fetched = [ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in own_arguments]
            self._object = worker_class(*fetched)
        with logs.about(**about):
            return getattr(self._object, method)(*arguments)


@dataclass(frozen=True)
class Workers:
    """Actors around objects of one class."""

    actors: list[Any]
    """Ray's handles; its own types do not know the methods."""
    made_from: list[ray.ObjectRef]
    """The class of the objects and its arguments; in a list, or Ray would fetch them for every call."""


@dataclass(frozen=True)
class _Call:
    """A call, and how often a node was lost with it."""

    key: Any
    arguments: tuple[Any, ...]
    n_lost: int = 0


@contextmanager
def start_workers(session: Session, worker_class: type, *arguments: Any) -> Iterator[Workers]:
    """`session.num_workers` actors of a plain class, each made with `arguments`; killed when the block is left.

    Object references among `arguments` are fetched by the worker; the caller keeps them alive as long as the workers,
    because a restarted one fetches them again.
    """
    options: dict[str, Any] = {
        "num_cpus": session.cpus_per_worker,
        "num_gpus": 1 if session.use_gpu else 0,
        "max_restarts": -1,
        "max_task_retries": _RETRIES,
    }
    host: Any = ray.remote(**options)(_Host)
    workers = Workers([host.remote() for _ in range(session.num_workers)], [ray.put((worker_class, arguments))])
    try:
        yield workers
    finally:
        for actor in workers.actors:
            ray.kill(actor)


def fan_out(
    workers: Workers,
    method: str,
    calls: Iterable[tuple[Key, tuple[Any, ...]]],
    *,
    leaves_first: bool = False,
    in_flight: int = 2,
) -> Iterator[tuple[Key, Any]]:
    """Results of the workers' `method` for each of the calls (key, arguments), as they complete, as (key, result).

    Object references among the arguments arrive as their values. With `leaves_first` the method returns two values, of
    which the first stays where it was computed; its reference comes in its place. At most `in_flight` calls wait at a
    worker: one is computed while the next one's arguments arrive. A BadInput or Outage raised in a worker is
    raised here as itself; any other error of a call as Ray's RayTaskError.

    A worker that takes `_SLOWER` times as long as the slowest call so far (one that is stopped) is replaced, and its
    calls run again; so do those of a worker that Ray cannot reach any more, its node being gone.
    """
    todo = (_Call(key, arguments) for key, arguments in calls)
    lost: deque[_Call] = deque()
    idle = deque(workers.actors * in_flight)
    pending: dict[ray.ObjectRef, tuple[_Call, Any, list[ray.ObjectRef]]] = {}
    patience = Patience()
    finished: tuple[_Call, list[ray.ObjectRef]] | None = None
    while True:
        # Before a result is handed over, its worker gets the next call.
        while idle and (call := lost.popleft() if lost else next(todo, None)) is not None:
            actor = idle.popleft()
            remote = actor.call.options(num_returns=2) if leaves_first else actor.call
            about = logs.now_about() | ({} if call.key is None else {"block": call.key})
            returned = remote.remote(workers.made_from, about, method, *call.arguments)
            *left, result = returned if leaves_first else [returned]
            pending[result] = call, actor, left
            patience.starts(actor)
        if finished is not None:
            call, references = finished
            finished = None
            try:
                with plain_errors():
                    value = ray.get(references[-1])
            except ActorUnavailableError:
                if call.n_lost == _RETRIES:
                    raise
                lost.append(replace(call, n_lost=call.n_lost + 1))
                continue
            yield call.key, (*references[:-1], value) if leaves_first else value
        if not pending:
            return
        while not (ready := ray.wait(list(pending), num_returns=1, timeout=patience.check_s())[0]):
            _replace_late(patience.late({actor for _, actor, _ in pending.values()}))
        call, actor, left = pending.pop(ready[0])
        patience.ends(actor)
        idle.append(actor)
        finished = call, [*left, ready[0]]


class Patience:
    """How long a worker may take for its next result, by the slowest one so far."""

    def __init__(self) -> None:
        self._slowest: float | None = None
        self._since: dict[Any, float] = {}
        """Of each worker that has calls: when it was last heard of."""

    def allowed_s(self) -> float:
        """Seconds from one result of a worker to its next, or from its first call to its first result."""
        return _FIRST_S if self._slowest is None else max(_LEAST_S, _SLOWER * self._slowest)

    def check_s(self) -> float:
        """Seconds to wait for a result before `late` is asked."""
        return self.allowed_s() / 4

    def starts(self, actor: Any) -> None:
        """A call was sent to the worker."""
        self._since.setdefault(actor, time.monotonic())

    def ends(self, actor: Any) -> None:
        """A result of the worker has come."""
        now = time.monotonic()
        self._slowest = max(self._slowest or 0.0, now - self._since.get(actor, now))
        self._since[actor] = now

    def late(self, actors: set[Any]) -> list[Any]:
        """Those of these workers, all with calls, that take too long; their time starts anew."""
        now = time.monotonic()
        found = [actor for actor in actors if now - self._since[actor] > self.allowed_s()]
        self._since |= dict.fromkeys(found, now)
        return found


def _replace_late(actors: Iterable[Any]) -> None:
    for actor in actors:
        logger.warning("a worker does not answer and is replaced; its blocks are computed again")
        ray.kill(actor, no_restart=False)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A BadInput or Outage of a worker arrives as it was raised, one line, instead of inside Ray's error and trace."""
    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            for kind in (BadInput, Outage):
                if isinstance(cause, kind) and not isinstance(cause, RayTaskError):
                    raise kind(str(cause)) from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise
