"""Drives a headless Chromium over its DevTools protocol; aiohttp comes with ray[default]."""

import asyncio
import base64
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

T = TypeVar("T")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


class Page:
    """One tab: what it shows, what it complained about, and which addresses it asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def _next(self) -> dict[str, Any]:
        message = await self._socket.receive_json()
        method, content = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning")
        ):
            self.complaints.append(str(content))
        if method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(content["entry"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        return message

    async def open(self, file: Path, width: int, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.command(f"{domain}.enable")
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])
        await self.command("Page.navigate", url=file.resolve().as_uri())
        while (await self._next()).get("method") != "Page.loadEventFired":
            pass

    async def evaluate(self, expression: str) -> Any:
        answer = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def screenshot(self, out: Path) -> None:
        answer = await self.command("Page.captureScreenshot", captureBeyondViewport=True)
        out.write_bytes(base64.b64decode(answer["data"]))


def in_chromium(folder: Path, visit: Callable[[Page], Awaitable[T]]) -> T:
    """What `visit` returns when given a fresh tab; skips where no Chromium is. `folder` holds its profile."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")

    async def run() -> T:
        async with _tab(program, folder) as page:
            return await visit(page)

    return asyncio.run(asyncio.wait_for(run(), 100))


@asynccontextmanager
async def _tab(program: str, folder: Path) -> AsyncIterator[Page]:
    with (folder / "chromium.log").open("wb") as log:
        browser = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        port = await _port(folder / "profile" / "DevToolsActivePort", browser)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            address = tabs[0]["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()


async def _port(file: Path, browser: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        if file.exists() and (lines := file.read_text().split()):
            return lines[0]
        assert browser.poll() is None, "Chromium ended before it listened; see chromium.log"
        await asyncio.sleep(0.05)
    raise AssertionError("Chromium did not listen within 30 s")
