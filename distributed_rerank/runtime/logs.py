"""Log lines of driver and workers in one format, on standard error: text with time and level, or JSON objects."""

import functools
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

PACKAGE = "distributed_rerank"
OBSERVED = "DISTRIBUTED_RERANK_OBSERVED"
"""The environment variable by which a driver tells its workers what `observe` was given, as JSON."""

_about: ContextVar[dict[str, Any]] = ContextVar("about")
_kept: ContextVar[list[Warning]] = ContextVar("kept")


def observe(**settings: str | None) -> None:
    """Keep these settings for this process and the workers that it starts: `job`, `log_format`, `profile`."""
    os.environ[OBSERVED] = json.dumps(settings)


def observed() -> dict[str, str | None]:
    """What `observe` was given, here or in the driver; {} where nothing was."""
    return _read(os.environ.get(OBSERVED, "{}"))


_read = functools.cache(json.loads)


@contextmanager
def about(**what: Any) -> Iterator[None]:
    """Log lines within say what they are about, beside what the block around says: `stage`, `block`."""
    token = _about.set(now_about() | what)
    try:
        yield
    finally:
        _about.reset(token)


def now_about() -> dict[str, Any]:
    """What log lines are about here, to be sent to a worker with its work."""
    return _about.get({})


@contextmanager
def kept_warnings() -> Iterator[list[Warning]]:
    """Python's warnings within, in this list and not in the log; none where another program shows its log lines."""
    kept: list[Warning] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


class LineFormatter(logging.Formatter):
    """Time and level before every line of a message, tables included; or a message as one line of JSON."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The lines of the message, a traceback's as well, each with the same prefix; in JSON one object."""
        text = super().format(record)
        prefix = f"{record.asctime} {record.levelname}"
        if observed().get("log_format") == "json":
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname, "logger": record.name}
            line |= {"job": observed().get("job"), "stage": None, "block": None} | now_about()
            return json.dumps(line | {"message": text.removeprefix(f"{prefix} ")}, default=str)
        first, *others = text.split("\n")
        return "\n".join([first, *(f"{prefix} {line}".rstrip() for line in others)])


def configure_driver() -> None:
    """Show log lines of this process, unless the program that it belongs to has set up logging itself.

    Of other libraries only warnings and errors, and of Python's warnings those that it would write itself.
    """
    if not logging.getLogger().handlers and not logging.getLogger(PACKAGE).handlers:
        _show(logging.getLogger())
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger(PACKAGE).setLevel(logging.INFO)


def configure_worker() -> None:
    """Show the package's log lines of a Ray worker, whatever Ray has set up there; once per process."""
    package = logging.getLogger(PACKAGE)
    if not package.handlers:
        _show(package)
        package.propagate = False  # Ray's own handlers would show each line again, without time
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train lets the INFO lines of every library through


def _show(logger: logging.Logger) -> None:
    warnings.filterwarnings("always", module=r"PIL\.")  # else only the first image of those with the same fault
    warnings.showwarning = _log_warning
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of Python as a log line; instead of `warnings.showwarning`."""
    warning = message if isinstance(message, Warning) else category(message)
    if (kept := _kept.get(None)) is not None:
        kept.append(warning)
    else:
        text = " ".join(str(warning).split())
        logging.getLogger(f"{PACKAGE}.warnings").warning("%s, %s:%d: %s", category.__name__, filename, lineno, text)
