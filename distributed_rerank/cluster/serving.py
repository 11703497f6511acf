"""Replicas of a `Reranker` on Ray Serve, asked again where one dies.

No proxy of Serve runs: the HTTP side lies in the driver (`online.front`), which holds each request until it is
answered. Serve gives a request to another replica only if the first one had not taken it yet; one that was being
computed fails with its replica. Ranking changes nothing, so it is then simply asked again.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.util.metrics import Counter, Histogram

from distributed_rerank.cluster.session import Session
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.online.answers import answer
from distributed_rerank.online.front import Backend
from distributed_rerank.online.requests import RerankRequest
from distributed_rerank.online.reranker import Reranker
from distributed_rerank.runtime import logs

logger = logging.getLogger(__name__)

_TRIES = 4
"""Of one request: a request that kills its replica must not kill them all for ever."""
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]


@dataclass(frozen=True)
class Service:
    """What every replica is made of."""

    settings: dict[str, Any]
    """Arguments of `Reranker.from_pretrained`."""
    max_pixels: int


class Replica:
    """One process with the model; the cache's file is shared by all replicas of a machine."""

    def __init__(self, service: Service) -> None:
        logs.configure_worker()
        self._max_pixels = service.max_pixels
        self._reranker = Reranker.from_pretrained(**service.settings, shared=service.settings["cache"] is not None)

    def rank(self, request: RerankRequest) -> list[dict[str, Any]] | BadInput:
        """See `answer`; what the client has to mend is returned, since Serve writes a traceback of what is raised."""
        try:
            return answer(self._reranker, request, self._max_pixels)
        except BadInput as error:
            return BadInput(str(error))


def fill(service: Service, images: list[ImageRef]) -> tuple[int, dict[str, str]]:
    """Encode the images that the cache lacks; how many it holds then, and why some cannot be read."""
    with Reranker.from_pretrained(**service.settings) as reranker:
        rejected = reranker.add([image.id for image in images], images)
        return len(reranker), rejected


@contextmanager
def replicas(session: Session, service: Service, images: list[ImageRef]) -> Iterator[Backend]:
    """Replicas that have `images` in their cache, one for each worker of the session, until the block ends.

    Raises BadInput as `Reranker.from_pretrained` does.
    """
    options = {"num_cpus": session.cpus_per_worker, "num_gpus": int(session.use_gpu)}
    n_cached, rejected = ray.get(ray.remote(fill).options(**options).remote(service, images))
    for id, reason in rejected.items():
        logger.warning("image %r cannot be read: %s", id, reason)
    logger.info("%d images in the cache", n_cached)
    for name in ("ray.serve", "asyncio"):  # both report a dead replica that was asked how busy it is, at length
        logging.getLogger(name).setLevel(logging.CRITICAL)
    deployment = serve.deployment(Replica).options(
        num_replicas=session.num_workers,
        max_ongoing_requests=2,  # one is computed, the next is already there
        ray_actor_options=options,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=2.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    # The cluster may have a Serve already, with other applications: it stays, and so do they.
    name = f"distributed-rerank-{secrets.token_hex(4)}"
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    try:
        handle = serve.run(deployment.bind(service), name=name, route_prefix=None)
        yield _backend(handle, name)
    finally:
        serve.delete(name)


def _backend(handle: Any, name: str) -> Backend:
    requests = Counter("rerank_http_requests", "Requests, by the status of the answer.", tag_keys=("status",))
    seconds = Histogram("rerank_http_seconds", "Seconds from a request to its answer.", boundaries=_SECONDS)

    async def rank(request: RerankRequest) -> list[dict[str, Any]]:
        for number in range(1, _TRIES + 1):
            try:
                results = await handle.rank.remote(request)
            except RayActorError as error:
                logger.warning("a replica died under a request (%s), try %d", type(error).__name__, number)
                await asyncio.sleep(0.05 * number)
                continue
            if isinstance(results, BadInput):
                raise results
            return results
        raise Outage(f"{_TRIES} replicas died under this request")

    async def count_ready() -> int:
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(name)
        states = [] if application is None else [d.replica_states for d in application.deployments.values()]
        return sum(count for state in states for kind, count in state.items() if str(kind).endswith("RUNNING"))

    def observe(status: int, took: float) -> None:
        requests.inc(tags={"status": str(status)})
        seconds.observe(took)

    return Backend(rank, count_ready, observe)
