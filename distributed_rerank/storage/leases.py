"""A lock in a bucket: an object that one process at a time holds, and must renew to keep.

It is made and renewed by conditional writes, so of two takers one succeeds. No clock is compared: who finds a lock
watches whether it is renewed, and takes it over if it is not. A store without conditional writes has no locks; that is
said once.
"""

import logging
import os
import secrets
import socket
import time

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import object_store
from distributed_rerank.storage.object_store import Conflict, Tag

logger = logging.getLogger(__name__)

PATIENCE_S = 45.0
"""A lock that nobody renews for so long belongs to a process that has ended; several times the seconds of a renewal."""
_LOOK_S = 1.0


class Lease:
    """The lock object `uri`; errors name `what` it protects."""

    def __init__(self, uri: str, what: str) -> None:
        self._uri, self._what = uri, what
        self._tag: Tag | None = None
        self._lost: str | None = None
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"

    def take(self) -> None:
        """Hold the lock. Raises BadInput where another process holds and renews it."""
        try:
            self._tag = object_store.write(self._uri, self._content(), replaces=None)
        except Conflict:
            self._take_over()
        except PermissionError as error:
            raise BadInput(str(error)) from error
        except BadInput as error:
            logger.warning("%s is not locked: %s", self._what, error)

    def renew(self) -> None:
        """Keep the lock. Raises BadInput, then and ever after, where another process has taken it over."""
        if self._lost is None and self._tag is not None:
            try:
                self._tag = object_store.write(self._uri, self._content(), replaces=self._tag)
            except Conflict:
                self._tag, self._lost = None, self._read()[0]
        if self._lost is not None:
            raise BadInput(f"{self._what} was taken over by {self._lost}; this job ends")

    def release(self) -> None:
        """Let others take the lock; does nothing where it is not held."""
        if self._tag is None:
            return
        self._tag = None
        folder, _, name = self._uri.rpartition("/")
        object_store.delete(folder, [name])

    def _take_over(self) -> None:
        holder, tag = self._read()
        logger.info("%s is locked by %s: watching for up to %.0f s whether it lives", self._what, holder, PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while tag is not None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            _, now = self._read()
            if now is not None and now != tag:
                raise self._in_use(holder)
            tag = now
        try:
            self._tag = object_store.write(self._uri, self._content(), replaces=tag)
        except Conflict:
            raise self._in_use(self._read()[0]) from None

    def _in_use(self, holder: str) -> BadInput:
        return BadInput(f"{self._what} is in use by {holder}; wait for it or choose another folder")

    def _read(self) -> tuple[str, Tag | None]:
        try:
            content, tag = object_store.read_tagged(self._uri)
        except FileNotFoundError:
            return "another process", None
        return content.decode(errors="replace").partition("\n")[0], tag

    def _content(self) -> bytes:
        # Another second line with each renewal, for a tag is the digest of the content.
        return f"{self._holder}\n{secrets.token_hex(8)}\n".encode()
