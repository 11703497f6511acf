"""States of a training run on disk: written beside and renamed, so that a kill never leaves half of one.
Layer 3.

A state is what `procedures.training.TrainingState.to_dict` gives: tensors, numbers, strings, lists and dicts.
It is read with `weights_only=True`: loading runs no pickled code.
"""

import re
from pathlib import Path
from typing import Any

import torch

from distributed_rerank.data.files import atomic_path

PATTERN = re.compile(r"epoch-(\d{5})\.pt")


def save(state: dict[str, Any], path: Path) -> None:
    """Writes `state` atomically and flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished:
        torch.save(state, unfinished)


def load(path: Path) -> dict[str, Any]:
    """The state at `path`, its tensors on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save_epoch(state: dict[str, Any], folder: Path, epoch: int, keep: int = 2) -> Path:
    """Writes the state after `epoch` epochs and removes all but the last `keep`; returns the file written."""
    path = folder / f"epoch-{epoch:05d}.pt"
    save(state, path)
    for old in saved_epochs(folder)[:-keep]:
        (folder / f"epoch-{old:05d}.pt").unlink()
    return path


def saved_epochs(folder: Path) -> list[int]:
    """Numbers of the epochs whose states lie complete in `folder`, ascending; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for entry in folder.iterdir() if (found := PATTERN.fullmatch(entry.name)))


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The state of the last complete epoch, or None where there is none."""
    epochs = saved_epochs(folder)
    return load(folder / f"epoch-{epochs[-1]:05d}.pt") if epochs else None
