"""Progress of long work: a bar on a terminal, plain log lines elsewhere, nothing for work that is over in 2
seconds. Layer 3."""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

_QUIET_SECONDS = 2.0
_LOG_EVERY_SECONDS = 10.0


def progress(
    results: Iterable[T],
    *,
    total: int,
    title: str,
    unit: str = "blocks",
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Pass `results` through unchanged and show how many of `total` have come.

    On a terminal a bar appears after 2 s. Elsewhere one log line is written about every 10 s and one at the
    end. A generator is closed when its results are no longer wanted, also by an error or Ctrl-C between two of them:
    its workers end then, and not when their Ray is gone already.
    """
    with ExitStack() as stack:
        if isinstance(results, Generator):
            stack.callback(results.close)
        if sys.stderr.isatty():
            bar = {"total": total, "desc": title, "unit": f" {unit}", "delay": _QUIET_SECONDS, "dynamic_ncols": True}
            yield from tqdm(results, **bar)
        else:
            yield from _logged(results, total, title, unit, clock)


def _logged(results: Iterable[T], total: int, title: str, unit: str, clock: Callable[[], float]) -> Iterator[T]:
    started = reported = clock()
    first: float | None = None
    done = 0
    for result in results:
        yield result
        done += 1
        now = clock()
        # What is left is told from the first result on: before it workers started, which they do only once.
        first = now if first is None else first
        if now - reported >= _LOG_EVERY_SECONDS:
            left = f", about {(now - first) / (done - 1) * (total - done):.0f} s left" if done > 1 else ""
            logger.info("%s: %d of %d %s%s", title, done, total, unit, left)
            reported = now
    if clock() - started >= _QUIET_SECONDS:
        logger.info("%s: %d %s in %.1f s", title, done, unit, clock() - started)


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the block takes to `timings` under `name`."""
    start = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - start, 3)
