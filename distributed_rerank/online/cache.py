"""Encodings of images in a memory-mapped file of a fixed size, with an index of ids that survives a restart.

A cache is a folder: `cache.json` says whose encodings it holds, `encodings.bin` has slots of equal size, and
`ids.jsonl` has a line for every change, so that a killed process loses its unfinished line at most. Every slot has a
checksum, which is compared when it is first read. Without a folder the same lies in memory.
"""

import json
import mmap
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locks
from distributed_rerank.storage.files import write_bytes, write_json

SCHEMA_VERSION = 1
_NONE = -1


@dataclass(frozen=True)
class Entry:
    """What is known of an id."""

    source: tuple[Any, ...]
    """Which image it is; another source is another image."""
    slot: int = _NONE
    """Where the encoding lies; -1 = not in the cache (any more)."""
    checksum: int = 0
    reason: str | None = None
    """Why the image cannot be read."""

    @property
    def is_cached(self) -> bool:
        """Whether the encoding is in the cache."""
        return self.slot != _NONE


class EncodingCache:
    """Bytes by id within a budget; the longest unused ones give way. Any thread may call it.

    One process at a time opens it, or several that share it: they read what it holds, from the same memory, and what
    they write stays with each of them.
    """

    def __init__(
        self, folder: Path | None, identity: dict[str, Any], slot_bytes: int, budget: int, *, shared: bool = False
    ) -> None:
        """Opens the cache in `folder`, which is made if absent; None = in memory. A shared one keeps its size.

        Raises BadInput where the budget holds no two encodings, where another process has the cache open, where it
        was made by another model, device or number format (`identity`), and for a shared one that does not exist.
        """
        self.slot_bytes, self.n_slots = slot_bytes, budget // slot_bytes
        if self.n_slots < 2:
            raise BadInput(f"cache_gb={budget / 10**9:g} holds no two encodings of {slot_bytes} bytes; give more")
        self._mutex = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()  # ids with a slot, the longest unused first
        self._checked: set[str] = set()
        self._folder, self._lock, self._log = folder, None, None
        if folder is None:
            self._slots = np.frombuffer(mmap.mmap(-1, self.n_slots * slot_bytes), np.uint8)
            self._slots = self._slots.reshape(self.n_slots, slot_bytes)
        else:
            self._open(folder, identity, shared)
        self._recent.update((id, None) for id, entry in self._entries.items() if entry.is_cached)
        used = {self._entries[id].slot for id in self._recent}
        self._free = [slot for slot in range(self.n_slots - 1, -1, -1) if slot not in used]

    def close(self) -> None:
        """Write all to disk and let another process open the cache; a second call does nothing."""
        with self._mutex:
            if self._log is not None:
                self._slots.flush()  # pyright: ignore[reportAttributeAccessIssue]  # a memmap
                self._log.close()
            if self._lock is not None:
                self._lock.release()
            self._log = self._lock = None

    def __len__(self) -> int:
        """How many encodings are in the cache."""
        return len(self._recent)

    def entry(self, id: str) -> Entry | None:
        """What is known of the id; None = nothing."""
        with self._mutex:
            return self._entries.get(id)

    def read(self, ids: Sequence[str]) -> tuple[UInt8[np.ndarray, "id slot"], list[str]]:
        """A copy of the bytes of each id, in their order, and the ids that have none (their rows are undefined)."""
        rows = np.empty((len(ids), self.slot_bytes), np.uint8)
        absent: list[str] = []
        with self._mutex:
            for row, id in enumerate(ids):
                entry = self._entries.get(id)
                if entry is None or not entry.is_cached:
                    absent.append(id)
                    continue
                rows[row] = self._slots[entry.slot]
                if id not in self._checked and zlib.crc32(rows[row].data) != entry.checksum:
                    self._release(id, entry)
                    absent.append(id)
                    continue
                self._checked.add(id)
                self._recent.move_to_end(id)
        return rows, absent

    def write(self, id: str, source: tuple[Any, ...], content: UInt8[np.ndarray, " slot"]) -> None:
        """Keep the bytes of an id; what it had before is replaced, and the longest unused id makes room."""
        with self._mutex:
            before = self._entries.get(id)
            if before is not None and before.is_cached:
                self._release(id, before)
            if not self._free:
                oldest = next(iter(self._recent))
                self._release(oldest, self._entries[oldest])
            slot = self._free.pop()
            self._slots[slot] = content
            self._note(id, Entry(source, slot, zlib.crc32(content.data)))
            self._checked.add(id)
            self._recent[id] = None

    def reject(self, id: str, source: tuple[Any, ...], reason: str) -> None:
        """Remember that the image of this id cannot be read."""
        with self._mutex:
            before = self._entries.get(id)
            if before is not None and before.is_cached:
                self._release(id, before)
            self._note(id, Entry(source, reason=reason))

    def _release(self, id: str, entry: Entry) -> None:
        """The slot of an id becomes free; the id stays known, with its source."""
        self._free.append(entry.slot)
        del self._recent[id]
        self._checked.discard(id)
        self._note(id, replace(entry, slot=_NONE))

    def _note(self, id: str, entry: Entry) -> None:
        self._entries[id] = entry
        if self._log is not None:
            self._log.write(_line(id, entry))
            self._log.flush()

    def _open(self, folder: Path, identity: dict[str, Any], shared: bool) -> None:
        if shared and not (folder / "encodings.bin").is_file():
            raise BadInput(f"{folder} holds no cache; make it with add() first")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = locks.share(folder / ".lock") if shared else locks.take(folder / ".lock")
        if self._lock is None:
            holder = locks.holder_of(folder / ".lock")
            raise BadInput(f"cache {folder} is open in {holder}; close that, or give this one another cache")
        described = {"schema_version": SCHEMA_VERSION, "slot_bytes": self.slot_bytes, **identity}
        try:
            self._check_identity(folder, described)
            if shared:
                self.n_slots = (folder / "encodings.bin").stat().st_size // self.slot_bytes
            self._entries.update(_read_index(folder / "ids.jsonl", self.n_slots))
            if not shared:
                with open(folder / "encodings.bin", "ab") as file:
                    file.truncate(self.n_slots * self.slot_bytes)  # what is not written yet takes no room on disk
        except BaseException:
            self._lock.release()
            raise
        shape = (self.n_slots, self.slot_bytes)
        # "c": a page that is written to becomes this process's own, and never reaches the file.
        self._slots = np.memmap(folder / "encodings.bin", np.uint8, "c" if shared else "r+", shape=shape)
        if shared:
            return
        write_bytes(folder / "ids.jsonl", "".join(_line(*item) for item in self._entries.items()).encode())
        self._log = open(folder / "ids.jsonl", "a", encoding="utf-8")  # closed by `close`

    def _check_identity(self, folder: Path, described: dict[str, Any]) -> None:
        path = folder / "cache.json"
        if not path.is_file():
            write_json(path, described)
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise BadInput(f"{path} is no JSON ({error}); delete {folder} to begin again") from error
        for name, value in described.items():
            if found.get(name) != value:
                raise BadInput(
                    f"cache {folder} was made with {name} {found.get(name)}, this is {value}; give another cache, "
                    "or delete it to begin again"
                )


def _line(id: str, entry: Entry) -> str:
    return json.dumps({"id": id, **asdict(entry)}, ensure_ascii=True) + "\n"


def _read_index(path: Path, n_slots: int) -> dict[str, Entry]:
    """The last entry of each id, in the order of the last lines; a last line that was cut off does not count."""
    entries: dict[str, Entry] = {}
    if not path.is_file():
        return entries
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            id, source, slot = content.pop("id"), _as_tuple(content.pop("source")), content.pop("slot")
        except (ValueError, KeyError):
            continue
        # A smaller budget than before has fewer slots.
        entries.pop(id, None)
        entries[id] = Entry(source, slot if slot < n_slots else _NONE, **content)
    return entries


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(part) for part in value) if isinstance(value, list) else value
