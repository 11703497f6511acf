"""Damage for chaos.py: a random bit of every kind of file that a job leaves, finished or not. Is it found?"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import artifacts, begun
from distributed_rerank.storage.artifacts import BlockStore
from distributed_rerank.storage.files import is_intact
from distributed_rerank.storage.manifests import MANIFEST, read_manifest
from distributed_rerank.training.encodings import holds_model
from distributed_rerank.training.tracking import has_its_checksums

Check = Callable[[Path], bool]
"""Whether the product takes the file for what was written; asked after a change, it must say no."""


@dataclass(frozen=True)
class Damaged:
    """How often a change of one kind of file was found."""

    kind: str
    found: int
    tried: int
    cut_found: int | None
    """Of as many files that were cut off at a random byte; None: what a kill cuts off there is no record."""

    @property
    def is_found(self) -> bool:
        """Whether nothing was missed."""
        return self.found == self.tried and self.cut_found in (None, self.tried)


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except BadInput:
        return True
    return False


def _of_finished(folder: Path) -> Check:
    """As a second start of the job that wrote `folder` looks at it."""

    def is_taken(path: Path) -> bool:
        return not _refuses(lambda: artifacts.is_complete(folder, read_manifest(folder)["fingerprint"]))

    return is_taken


def _of_block(path: Path) -> bool:
    number = int(path.name.split(".")[0].removeprefix("block-"))
    return number in BlockStore(path.parent).done()


def _of_sealed(path: Path) -> bool:
    return is_intact(path.with_name(path.name.removesuffix(".sha256")))


UNFINISHED: dict[str, tuple[str, Check]] = {
    "block of a stage": (r"blocks/[a-z_]+/block-.*\.parquet", _of_block),
    "what the run was begun with": (r"\.begun\.json", lambda path: not _refuses(lambda: begun.recall(path.parent))),
    "state of a training": (r"checkpoints/epoch-.*\.pt(\.sha256)?", _of_sealed),
    "encodings of a training": (r"(encodings|features)/view-.*\.pt(\.sha256)?", _of_sealed),
    "model that a training goes on with": (r"(untrained|encoder-\w+)/[\w.]+", lambda path: holds_model(path.parent)),
    "event file of TensorBoard": (r"events\..*", has_its_checksums),
}
"""Where a file's path matches the pattern, this is how the product looks at it."""
NOT_READ = re.compile(r"(.*/)?\.[^/]*\.tmp|.*\.lock|(model|mining)\.\w+|README\.md|suspects\.parquet")
"""Never read: half of a file that was being written, and results that are written anew at the end."""


def damage_finished(folder: Path, scratch: Path, times: int, generator: np.random.Generator) -> list[Damaged]:
    """Every file of a finished folder."""
    own = scratch / folder.name
    shutil.copytree(folder, own)
    found = []
    for path in sorted(path for path in own.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(own).as_posix()
        name = re.sub(r"events\.out.*", "events", name)
        found.append(_try(f"finished {folder.name}: {name}", [path], lambda _: _of_finished(own), times, generator))
    return found


def damage_unfinished(folder: Path, scratch: Path, times: int, generator: np.random.Generator) -> list[Damaged]:
    """Every kind of file of an unfinished folder. Raises AssertionError for a file of no known kind."""
    own = scratch / f"unfinished {folder.name}"
    shutil.copytree(folder, own)
    kinds: dict[str, tuple[list[Path], Callable[[Path], Check]]] = {}
    for path in sorted(path for path in own.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(own).as_posix()
        kind, of_path = _kind(own, name)
        # A kill may come between a file and its digest: what is left alone is never read.
        if kind and not (path.suffix == ".sha256" and not path.with_suffix("").exists()):
            kinds.setdefault(kind, ([], of_path))[0].append(path)
    return [_try(f"unfinished: {kind}", paths, of_path, times, generator) for kind, (paths, of_path) in kinds.items()]


def _kind(folder: Path, name: str) -> tuple[str, Callable[[Path], Check]]:
    for kind, (pattern, check) in UNFINISHED.items():
        if re.search(f"(^|/){pattern}$", name):
            return kind, lambda path, check=check: check
    around = [folder / outer for outer in Path(name).parents if (folder / outer / MANIFEST).is_file()]
    if around:
        outer = around[0]
        return "finished stage inside", lambda path: _of_finished(_manifest_of(path, outer))
    assert NOT_READ.fullmatch(name), f"{folder / name} is a file of no known kind"
    return "", lambda path: has_its_checksums


def _manifest_of(path: Path, default: Path) -> Path:
    return next((outer for outer in path.parents if (outer / MANIFEST).is_file()), default)


def _try(
    kind: str, paths: list[Path], check_of: Callable[[Path], Check], times: int, generator: np.random.Generator
) -> Damaged:
    found = cut = 0
    for number in range(times):
        path = paths[number % len(paths)]
        check, content = check_of(path), path.read_bytes()
        assert number >= len(paths) or check(path), f"{path} is refused although nothing has changed it"
        changed, place = bytearray(content), int(generator.integers(len(content)))
        changed[place] ^= 1 << int(generator.integers(8))
        found += not _ask(check, path, bytes(changed), content)
        cut += not _ask(check, path, content[: int(generator.integers(len(content)))], content)
    return Damaged(kind, found, times, None if check_of(paths[0]) is has_its_checksums else cut)


def _ask(check: Check, path: Path, content: bytes, whole: bytes) -> bool:
    """What the check says of this content; then everything is as it was, also what was set aside."""
    path.write_bytes(content)
    logging.disable(logging.WARNING)  # each time the product says what it sets aside
    answer = check(path)
    logging.disable(logging.NOTSET)
    for outer in (path, path.parent):
        aside = outer.with_name(f"{outer.name}.damaged")
        if aside.exists():
            aside.rename(outer)
    state = path.with_name(path.name.removesuffix(".sha256"))
    aside = state.with_name(f"{state.name}.damaged")
    if aside.exists():
        aside.rename(state)
    path.write_bytes(whole)
    return answer
