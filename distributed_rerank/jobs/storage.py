"""A job whose folders and files lie in buckets, as one whose folders and files are local.

Inputs are fetched before the job; what it writes is published after it. The job itself knows paths only.
"""

import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.config.jobs import TrainJob
from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.errors import BadInput, Outage

logger = logging.getLogger(__name__)

INPUTS = (
    "embeddings", "adapt", "candidates", "external", "baseline", "expect_from", "model", "teacher", "chain", "weights",
    "pairwise_weights",
)  # fmt: skip
FOLDERS = ("out",)
"""Written by a job; `train` adds to its embeddings as well."""
FILES = ("trec", "markdown")
_OUTPUTS = (*FOLDERS, *FILES, "runs", "history")
_LONGEST_NAME = 200
"""Bytes; the hidden names beside it are longer, and file systems end at 255."""
_URI = re.compile(r"(s3|gs|gcs|az|abfs|file):/+(.*)", re.DOTALL)
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/.*", re.DOTALL)
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of every job that was submitted to a Ray cluster."""


def uri_of(value: Any) -> str | None:
    """The URI that a text or path is, file:// included; None for a plain path. A Path holds it with one slash less."""
    found = _URI.fullmatch(str(value)) if isinstance(value, str | Path) else None
    return None if found is None else f"{found[1]}://{'/' if found[1] == 'file' else ''}{found[2].lstrip('/')}"


@contextmanager
def local_job(job: Any) -> Iterator[Any]:
    """The job with a local path for every URI among its files; within the block it may run.

    Raises BadInput for a relative output of a submitted job, and as `remote_folders` does.
    """
    _refuse_lost_outputs(job)
    for name, value in _values(job):
        if name in _OUTPUTS and uri_of(value) is None and _OTHER_SCHEME.fullmatch(str(value)):
            raise BadInput(
                f"--{name} {value} is in no store that can be written; give a folder, or s3://, gs://, az://"
            )
    job = _replaced(job, _without_file_scheme)
    if isinstance(getattr(job, "out", None), Path) and uri_of(job.out) is None:
        _check_place(job.out)
    if not any(uri_of(value) for name, value in _values(job) if name in (*INPUTS, *_OUTPUTS)):
        yield job
        return
    cluster = next((value for _, value in _values(job) if isinstance(value, ClusterConfig)), None)
    if cluster is None:
        raise BadInput(
            f"--out {uri_of(job.out)}: this job writes on this machine only; give a path, then copy the result"
        )
    written = (*FOLDERS, "embeddings") if isinstance(job, TrainJob) else FOLDERS
    places = _Places(cluster.scratch.expanduser().absolute(), written)
    try:
        with ExitStack() as stack:
            yield _replaced(job, lambda name, value: places.local(name, value, stack))
    except (BadInput, Outage) as error:
        raise type(error)(places.named_by_uri(str(getattr(error, "cause", error)))) from error


class _Places:
    """The local places of a job's URIs."""

    def __init__(self, scratch: Path, written: tuple[str, ...]) -> None:
        self._scratch, self._written = scratch, written
        self._uris: dict[str, str] = {}

    def local(self, name: str, value: Any, stack: ExitStack) -> Any:
        """The value to use in place of the field's."""
        if isinstance(value, ScheduleConfig):
            return self._schedule(value, stack)
        uri = uri_of(value) if name in (*INPUTS, *FOLDERS, *FILES) else None
        if uri is None:
            return value
        from distributed_rerank.storage.remote_folders import RemoteFolder, fetch

        place = self.place(uri)
        if name in self._written:
            stack.enter_context(RemoteFolder(uri, place))
        elif name in FILES:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(_upload, place, uri)
        else:
            fetch(uri, place)
        return place if isinstance(value, Path) else str(place)

    def place(self, uri: str) -> Path:
        """Where a URI's copy lies: below a folder named by a digest of it, under its own name."""
        from distributed_rerank.storage.files import bytes_digest

        place = self._scratch / bytes_digest(uri.rstrip("/").encode())[:16] / uri.rstrip("/").rpartition("/")[2]
        self._uris[str(place)] = uri
        return place

    def named_by_uri(self, message: str) -> str:
        """The message with URIs in place of their copies."""
        for place, uri in self._uris.items():
            message = message.replace(place, uri)
        return message

    def _schedule(self, schedule: ScheduleConfig, stack: ExitStack) -> ScheduleConfig:
        """History and runs: this run's folder is written, the previous run's is read."""
        from distributed_rerank.monitoring.remote_history import RemoteHistory
        from distributed_rerank.storage.remote_folders import RemoteFolder, fetch

        history, runs = uri_of(schedule.history), uri_of(schedule.runs)
        if (history is None) != (runs is None):
            raise BadInput("one of --history and --runs is a URI; give both as URIs, or both as paths")
        if history is None or runs is None:
            return schedule
        local = dataclasses.replace(schedule, history=self.place(history), runs=self.place(runs))
        # The run's folder is published first, and the row that names it after that.
        remote = stack.enter_context(RemoteHistory(history, local.history))
        stack.enter_context(RemoteFolder(f"{runs}/{schedule.run_id}", local.folder))
        for run_id in remote.references(schedule.run_id):
            try:
                fetch(f"{runs}/{run_id}", local.runs / run_id)
            except BadInput as error:
                logger.warning("%s", error)  # the verdict says that the run is gone
        if schedule.baseline is not None and uri_of(schedule.baseline):
            baseline = uri_of(schedule.baseline)
            local = dataclasses.replace(local, baseline=fetch(str(baseline), self.place(str(baseline))))
        return local


def _refuse_lost_outputs(job: Any) -> None:
    for name, value in _values(job):
        if name == "metrics_file" and uri_of(value):
            raise BadInput(f"--metrics-file {uri_of(value)} is for a program on this machine; give a path")
        is_output = name in (*_OUTPUTS, "metrics_file")
        if _JOB not in os.environ or not is_output or value is None or uri_of(value) or Path(value).is_absolute():
            continue
        raise BadInput(
            f"--{name.replace('_', '-')} {value} is relative: a submitted job runs in a scratch copy of the working "
            "directory, which is deleted with all in it; give an absolute path that the head keeps, or a URI such as "
            f"s3://bucket/{value}"
        )


def _check_place(out: Path) -> None:
    """Raises BadInput for an output that could not be written at the end: a link, below a file, no room, no leave."""
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise BadInput(f"--out {out.name[:20]}...: the name is longer than {_LONGEST_NAME} bytes; give a shorter one")
    if out.is_symlink():
        raise BadInput(f"--out {out} is a link; give what it leads to: --out {os.path.realpath(out)}")
    if out.exists():
        return  # finished, perhaps on a disk that is read-only by now, or refused with its reason later
    parent = next(outer for outer in out.absolute().parents if outer.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        reason = "it is a file" if not parent.is_dir() else os.strerror(error.errno or 0)
        raise BadInput(f"--out {out}: nothing can be written to {parent} ({reason}); choose another --out") from None


def _without_file_scheme(name: str, value: Any) -> Any:
    uri = uri_of(value) if name in (*INPUTS, *_OUTPUTS) else None
    if uri is None or not uri.startswith("file:"):
        return value
    path = uri.removeprefix("file://")
    return Path(path) if isinstance(value, Path) else path


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a config with their values, those of configs inside too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield field.name, value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _values(value)


def _replaced(config: Any, change: Callable[[str, Any], Any]) -> Any:
    """The config with changed fields; a config inside is changed as a whole or else field by field."""
    new = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        changed = change(field.name, value)
        if changed is value and dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed = _replaced(value, change)
        if changed is not value:
            new[field.name] = changed
    return dataclasses.replace(config, **new) if new else config


def _upload(place: Path, uri: str) -> None:
    from distributed_rerank.storage import object_store

    if place.is_file():
        object_store.write(uri, place)
