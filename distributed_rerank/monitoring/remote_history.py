"""A history of runs that lies in a bucket: fetched before the run, written back with whatever others have added."""

import logging
from pathlib import Path
from types import TracebackType

from distributed_rerank.errors import Outage
from distributed_rerank.monitoring.history import merge, read_history, references
from distributed_rerank.storage import object_store
from distributed_rerank.storage.files import write_bytes
from distributed_rerank.storage.object_store import Conflict, Tag

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

    def references(self, run_id: str) -> set[str]:
        """The ids of the earlier runs that `run_id` is compared with."""
        return {name for name in references(read_history(self._path), run_id) if name is not None}

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
