"""Progress of long work: a bar on a terminal, plain log lines elsewhere, nothing for work shorter than 2 seconds."""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

_QUIET_SECONDS = 2.0
_LOG_EVERY_SECONDS = 10.0


def progress(results: Iterable[T], **shown: Any) -> Iterator[T]:
    """Pass `results` through unchanged and show how many have come; `shown` as for `Progress`."""
    with Progress(results, **shown) as bar:
        for result in results:
            yield result
            bar.update()


class Progress:
    """Shows how many of `total` results have come, while a `with` block takes them and calls `update` after each.

    On a terminal a bar appears after 2 s. Elsewhere one log line is written about every 10 s and one at the end. A
    generator is closed at the end of the block, also by an error or Ctrl-C between two results: its workers end then,
    and not when their Ray is gone already.
    """

    def __init__(
        self,
        results: Iterable[Any],
        *,
        total: int,
        title: str,
        unit: str = "blocks",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._results, self._total, self._title, self._unit, self._clock = results, total, title, unit, clock
        self._is_logged = not sys.stderr.isatty()
        look: dict[str, Any] = {"unit": f" {unit}", "delay": _QUIET_SECONDS, "dynamic_ncols": True}
        self._bar = tqdm(total=total, desc=title, disable=self._is_logged, **look)
        self._started = self._reported = clock()
        self._first: float | None = None
        self._done = 0

    def __enter__(self) -> "Progress":
        return self

    def update(self) -> None:
        """Count one more result."""
        self._bar.update()
        self._done += 1
        now = self._clock()
        # What is left is told from the first result on: before it workers started, which they do only once.
        self._first = now if self._first is None else self._first
        if self._is_logged and now - self._reported >= _LOG_EVERY_SECONDS:
            left = (now - self._first) / max(self._done - 1, 1) * (self._total - self._done)
            text = f", about {left:.0f} s left" if self._done > 1 else ""
            logger.info("%s: %d of %d %s%s", self._title, self._done, self._total, self._unit, text)
            self._reported = now

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if isinstance(self._results, Generator):
            self._results.close()
        seconds = self._clock() - self._started
        if self._is_logged and kind is None and seconds >= _QUIET_SECONDS:
            unit = self._unit.removesuffix("s") if self._done == 1 else self._unit
            logger.info("%s: %d %s in %.1f s", self._title, self._done, unit, seconds)


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes to `timings` under `name`."""
    start = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - start, 3)
