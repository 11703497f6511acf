"""Chrome traces of the first block of each kind of worker, where --profile asks for them."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch.profiler import _ExperimentalConfig, profile, supported_activities

from distributed_rerank.runtime import logs

logger = logging.getLogger(__name__)

_tracing = threading.Lock()
_traced: set[str] = set()


@contextmanager
def traced(kind: Literal["embed", "search", "score", "train"]) -> Iterator[None]:
    """Trace the block inside, if it is the first of its kind in this process and `--profile` names a folder.

    The trace is KIND-HOST-PROCESS.json there, for Perfetto or chrome://tracing. What fails leaves none.
    """
    folder = logs.observed().get("profile")
    if not folder or kind in _traced or not _tracing.acquire(blocking=False):
        yield
        return
    try:
        _traced.add(kind)
        every_thread = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=supported_activities(), experimental_config=every_thread) as trace:
            yield
        path = Path(folder) / f"{kind}-{socket.gethostname()}-{os.getpid()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
        logger.info("trace of a block: %s", path)
    finally:
        _tracing.release()
