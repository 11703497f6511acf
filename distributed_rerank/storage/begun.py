"""What an unfinished folder was begun with, so that one result never mixes devices or number formats.

An unfinished folder holds `.begun.json`. Workers tell with their results what they computed with. The first answer is
remembered there, and a later one that differs is refused by name. Unfinished folders around it remember the device and
what precision "auto" means there, so that a run does not go on elsewhere between two of its stages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_rerank.errors import BadInput
from distributed_rerank.storage.files import OWN_DIGEST, has_its_digest, with_digest, write_json

BEGUN = ".begun.json"


@dataclass(frozen=True)
class ComputedWith:
    """What a worker computed a result with."""

    device: str
    """cpu or cuda."""
    precision: str | None = None
    """float32 or bfloat16, the number format of its network; None: no network took part."""
    auto_precision: str | None = None
    """What precision "auto" means on this device, if it was asked for; a network may still be an exception to it."""
    gpu: str | None = None
    """Which kind of GPU; it is told, not compared."""


def begin(folder: Path) -> None:
    """Make the folder if absent, and mark it as unfinished if it is not."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / BEGUN).is_file():
        note(folder, {})


def unfinished_around(folder: Path) -> list[Path]:
    """The unfinished folders that `folder` lies in, the outermost first."""
    return [outer for outer in reversed(folder.absolute().parents) if (outer / BEGUN).is_file()]


def remember(folder: Path, found: ComputedWith) -> None:
    """Remember `found` in an unfinished folder and in those around it. Raises BadInput as `refuse_other` does."""
    refuse_other(folder, found)
    outside = {name: value for name, value in _facts(found).items() if name != "precision"}
    for outer in _concerned(folder, found):
        _add(outer, outside, found.gpu)
    _add(folder, _facts(found), found.gpu)


def refuse_other(folder: Path, found: ComputedWith) -> None:
    """Raises BadInput where this folder, or an unfinished one around it, was begun with something else."""
    for place in [*_concerned(folder, found), folder]:
        other = difference(recall(place), found)
        if other:
            raise BadInput(f"{place} was begun {other}; go on where it was begun, or delete {place} to begin again")


def _concerned(folder: Path, found: ComputedWith) -> list[Path]:
    """The unfinished folders around: networks of one run belong together, a search may run in another place."""
    return [] if found.precision is None else unfinished_around(folder)


def difference(known: dict[str, Any], found: ComputedWith) -> str:
    """Both in words, as the end of a sentence, where they differ in what both say; else ""."""
    facts = _facts(found)
    if any(known[name] != facts[name] for name in facts.keys() & known.keys()):
        shared = {name: value for name, value in facts.items() if name in known}
        return f"with {_in_words(known)}, a worker of this run computes with {_in_words(shared)}"
    return ""


def recall(folder: Path) -> dict[str, Any]:
    """What `remember` has stored in the folder, as a manifest tells it; {} where nothing was computed yet."""
    path = folder / BEGUN
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); delete {folder} to begin again") from None
    if not isinstance(found, dict) or not has_its_digest(found, text):
        raise BadInput(f"{path} is damaged (not what was written); delete {folder} to begin again")
    return {name: value for name, value in found.items() if name != OWN_DIGEST}


def note(folder: Path, known: Mapping[str, Any]) -> None:
    """Store what `recall` will give, in place of what was stored."""
    write_json(folder / BEGUN, with_digest(dict(known)))


def join(known: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two answers of `recall` that do not contradict each other as one."""
    gpus = sorted({*known.get("gpus", []), *more.get("gpus", [])})
    return {**more, **known, **({"gpus": gpus} if gpus else {})}


def _facts(found: ComputedWith) -> dict[str, Any]:
    facts = {"device": found.device, "precision": found.precision, "auto_precision": found.auto_precision}
    return {name: value for name, value in facts.items() if value is not None}


def _add(folder: Path, facts: dict[str, Any], gpu: str | None) -> None:
    known = recall(folder)
    whole = join(known, facts if gpu is None else {**facts, "gpus": [gpu]})
    if whole != known:
        folder.mkdir(parents=True, exist_ok=True)
        note(folder, whole)


def _in_words(facts: dict[str, Any]) -> str:
    if "precision" in facts:
        return f"precision={facts['precision']} on {facts['device']}"
    if "auto_precision" in facts:
        return f"precision=auto ({facts['auto_precision']}) on {facts['device']}"
    return f"device={facts['device']}"
