"""The HTTP side of `serve`: who may ask, how much, and one line of JSON for whatever is refused.

A request is held here until it is answered. Who computes may therefore die in the middle: it is asked again.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from distributed_rerank.config.serving import ServeConfig
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.online.requests import RerankRequest, read_request

logger = logging.getLogger(__name__)

PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
_LARGE = 1 << 18
"""Bytes of a body above which it is read in a thread, so that the others do not wait."""
_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Backend:
    """Who computes."""

    rank: Callable[[RerankRequest], Awaitable[list[dict[str, Any]]]]
    """Raises BadInput for what the client has to mend, Outage where nobody could compute."""
    count_ready: Callable[[], Awaitable[int]]
    """How many processes can compute now."""
    observe: Callable[[int, float], None]
    """Is told the status and the seconds of each request."""


def run(listening: socket.socket, backend: Backend, config: ServeConfig, token: str | None, model: str) -> None:
    """Answer requests until SIGINT or SIGTERM; those under way are then answered first, for `timeout_s` at most."""
    asyncio.run(_run(listening, Front(backend, config, token, model)))


async def _run(listening: socket.socket, front: "Front") -> None:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    runner = web.AppRunner(
        front.application(), access_log=None, handle_signals=False, shutdown_timeout=front.config.timeout_s
    )
    await runner.setup()
    await web.SockSite(runner, listening).start()
    host, port = listening.getsockname()[:2]
    logger.info("serving http://%s:%d/rerank, %s", host, port, "with a token" if front.token else "without a token")
    await stopped.wait()
    logger.info("stopping: requests under way are answered")
    await runner.cleanup()


class Front:
    """The handlers."""

    def __init__(self, backend: Backend, config: ServeConfig, token: str | None, model: str) -> None:
        self.backend, self.config, self.token, self._model = backend, config, token, model
        self._n_waiting = 0
        self._ready, self._ready_until, self._asking = 0, 0.0, asyncio.Lock()

    def application(self) -> web.Application:
        """The routes, with one line of JSON for every error."""
        app = web.Application(middlewares=[self._in_one_line], client_max_size=self._max_bytes)
        app.router.add_get("/health", self._health)
        for path in PATHS:
            app.router.add_post(path, self._rerank)
        return app

    @property
    def _max_bytes(self) -> int:
        return int(self.config.max_body_mb * 10**6)

    @web.middleware
    async def _in_one_line(self, request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        began = time.perf_counter()
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = _refusal(error.status, error.text or error.reason, error.headers)
        except BadInput as error:
            response = _refusal(400, str(error))
        except TimeoutError:
            response = _refusal(504, f"no answer within {self.config.timeout_s:g} seconds")
        except Outage as error:
            response = _refusal(503, str(error), {"Retry-After": "1"})
        except Exception:
            logger.exception("a request failed")
            response = _refusal(500, "the server failed; its log says why")
        if request.path != "/health":
            self.backend.observe(response.status, time.perf_counter() - began)
        return response

    async def _health(self, request: web.Request) -> web.Response:
        """Whether somebody can compute, asked at most once a second."""
        async with self._asking:
            if time.monotonic() > self._ready_until:
                self._ready = await self.backend.count_ready()
                self._ready_until = time.monotonic() + 1.0
        status = "ok" if self._ready else "no replica is ready"
        return web.json_response({"status": status, "replicas": self._ready}, status=200 if self._ready else 503)

    async def _rerank(self, request: web.Request) -> web.Response:
        self._check_sender(request)
        if self._n_waiting >= self.config.max_waiting:
            raise Outage(f"{self._n_waiting} requests are under way; try again")
        self._n_waiting += 1
        try:
            body = await self._body(request)
            async with asyncio.timeout(self.config.timeout_s):
                asked = (
                    read_request(body, self.config)
                    if len(body) < _LARGE
                    else await asyncio.to_thread(read_request, body, self.config)
                )
                results = await self.backend.rank(asked)
        finally:
            self._n_waiting -= 1
        return web.json_response({"model": self._model, "results": results})

    def _check_sender(self, request: web.Request) -> None:
        """Raises where the token is not right, or a web page of another site may have sent the request."""
        if self.token is not None:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                raise web.HTTPUnauthorized(
                    text="send the right token as Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"}
                )
        elif not _is_this_machine(request.headers.get("Host", "")):
            raise web.HTTPForbidden(text="without a token only this machine may ask, by its loopback address")
        # Browsers send JSON to another site only after asking for leave, which is never given here.
        if request.content_type != "application/json" or request.headers.get("Content-Encoding"):
            raise web.HTTPUnsupportedMediaType(text="send Content-Type: application/json, not compressed")

    async def _body(self, request: web.Request) -> bytes:
        too_large = f"the body exceeds the limit of {self._max_bytes} bytes"
        if (request.content_length or 0) > self._max_bytes:
            raise web.HTTPRequestEntityTooLarge(self._max_bytes, request.content_length or 0, text=too_large)
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            error.text = too_large
            raise
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"the body took over {self.config.timeout_s:g} seconds") from None


def _is_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _refusal(status: int, message: str | None, headers: Any = None) -> web.Response:
    kept = {name: headers[name] for name in ("Retry-After", "WWW-Authenticate", "Allow") if name in (headers or {})}
    line = " ".join((message or "").split())[:_LONGEST_MESSAGE]
    return web.Response(
        status=status, text=json.dumps({"message": line}), content_type="application/json", headers=kept
    )
