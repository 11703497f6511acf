"""Re-ranking requests over HTTP."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from distributed_rerank.config.jobs import ServeJob
from distributed_rerank.config.serving import ServeConfig
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.errors import BadInput
from distributed_rerank.online.answers import answer
from distributed_rerank.online.front import Backend, run
from distributed_rerank.online.requests import RerankRequest
from distributed_rerank.online.reranker import Reranker

logger = logging.getLogger(__name__)


def main(job: ServeJob, images: list[ImageRef], token: str | None) -> None:
    """Answer requests until Ctrl-C."""
    limits = job.serving
    is_folder = Path(job.model).is_dir()
    settings: dict[str, Any] = {  # replicas may run in another folder
        "model": str(Path(job.model).absolute()) if is_folder else job.model,
        "chain": job.chain.absolute() if isinstance(job.chain, Path) else job.chain,
        "top_n": job.top_n,
        "cache": None if job.cache is None else job.cache.absolute(),
        "cache_gb": job.cache_gb,
    }
    max_pixels = int(limits.max_megapixels * 10**6)
    with _listen(limits) as listening:
        if job.cluster.num_workers == 0:
            with _this_process(settings, max_pixels, images) as backend:
                run(listening, backend, limits, token, job.model)
            return
        from distributed_rerank.cluster.serving import Service, replicas
        from distributed_rerank.cluster.session import connect

        with connect(job.cluster, limits.metrics_port) as session:
            with replicas(session, Service(settings, max_pixels), images) as backend:
                run(listening, backend, limits, token, job.model)


def _listen(limits: ServeConfig) -> socket.socket:
    """The socket, before the work that an occupied port would waste."""
    family = socket.AF_INET6 if ":" in limits.host else socket.AF_INET
    try:
        return socket.create_server((limits.host, limits.port), family=family, backlog=limits.max_waiting)
    except OSError as error:
        raise BadInput(f"--host {limits.host} --port {limits.port} cannot be used ({error}); give another") from error


@contextmanager
def _this_process(settings: dict[str, Any], max_pixels: int, images: list[ImageRef]) -> Iterator[Backend]:
    """One thread of this process computes."""
    with Reranker.from_pretrained(**settings) as reranker, ThreadPoolExecutor(1) as pool:
        for id, reason in reranker.add([image.id for image in images], images).items():
            logger.warning("image %r cannot be read: %s", id, reason)

        async def rank(request: RerankRequest) -> list[dict[str, Any]]:
            return await asyncio.get_running_loop().run_in_executor(
                pool, partial(answer, reranker, request, max_pixels)
            )

        async def count_ready() -> int:
            return 1

        yield Backend(rank, count_ready, lambda status, seconds: None)
