"""A history of runs that lies in a bucket: fetched before the run, written back with whatever others have added."""

import logging
from pathlib import Path
from types import TracebackType

from distributed_rerank.data import object_store
from distributed_rerank.data.files import write_bytes
from distributed_rerank.data.object_store import Conflict, Tag
from distributed_rerank.errors import Outage
from distributed_rerank.monitoring.history import merge, read_history

logger = logging.getLogger(__name__)

_ATTEMPTS = 20


class RemoteHistory:
    """The history at `uri` as the local file `path` while the block lasts; leaving it writes new rows back."""

    def __init__(self, uri: str, path: Path) -> None:
        self._uri, self._path = uri, path

    def __enter__(self) -> "RemoteHistory":
        self._fetched, _ = self._fetch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._path.is_file():
            self._write_back()

    def last_run(self) -> str | None:
        """The id of the run in the last row."""
        table = read_history(self._path)
        return None if table.empty else str(table["run_id"].iloc[-1])

    def say_missing(self, reason: str) -> None:
        """Log why an earlier run cannot be compared with; the verdict says so as well."""
        logger.warning("%s", reason)

    def _fetch(self) -> tuple[bytes | None, Tag | None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content, tag = object_store.read_tagged(self._uri)
        except FileNotFoundError:
            self._path.unlink(missing_ok=True)
            return None, None
        write_bytes(self._path, content)
        return content, tag

    def _write_back(self) -> None:
        """Write the file unless it is as it was; where another job wrote meanwhile, both jobs' rows are kept."""
        own = self._path.read_bytes()
        page = self._path.with_suffix(".html")
        if page.is_file():
            object_store.write(self._uri.rpartition(".")[0] + ".html", page)
        if own == self._fetched:
            return
        for _ in range(_ATTEMPTS):
            _, tag = self._fetch()
            merge(self._path, own)
            try:
                object_store.write(self._uri, self._path, replaces=tag)
                return
            except Conflict:
                continue
        raise Outage(f"{self._uri} is written by others all the time; the same command goes on later")
