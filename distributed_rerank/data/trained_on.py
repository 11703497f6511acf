"""The first stage that a pairwise model was trained on: `trained_on.json` in its folder.

A model and its chain read first-stage distances as numbers. They are right only for distances of the same kind, from
embeddings of the same extractor, so both are written down, with the spread of the distances.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from distributed_rerank.errors import BadInput
from distributed_rerank.storage.files import write_json
from distributed_rerank.tensors.candidate_lists import CandidateLists

TRAINED_ON = "trained_on.json"
SPREAD_RANKS = (1, 2, 5, 10)
SPREAD_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
LENGTH_TOLERANCE = 1e-2
"""Of a length of 1: embeddings may have been stored in half precision."""
_NOT_COMPARED = ("weights", "precision", "extractor_seed")
"""Settings of an extractor that may differ: a number format changes little, and weights are compared by content."""


@dataclass(frozen=True)
class TrainedOn:
    """Embeddings and distances of the candidate lists that a model was trained on."""

    distances: str
    """Their kind: l2."""
    normalised: bool
    """Whether the embeddings have length 1."""
    dim: int
    extractor: Mapping[str, Any]
    """The settings of the extractor, with the digest of its weights."""
    spread: Mapping[str, list[float]]
    """By rank, the `SPREAD_QUANTILES` of the distances of the candidates there."""
    from_table: bool = False
    """Whether another program wrote the embeddings, so that nobody knows whether the extractor made them."""


def are_normalised(blocks: Iterable[Float32[np.ndarray, "image dim"]]) -> bool:
    """Whether all embeddings of these blocks have length 1."""
    lengths = (np.sqrt(np.einsum("id,id->i", block, block, dtype=np.float64)) for block in blocks)
    return all((np.abs(of_block - 1) < LENGTH_TOLERANCE).all() for of_block in lengths)


def spread_of(lists: CandidateLists) -> dict[str, list[float]]:
    """By rank (those of `SPREAD_RANKS` that the lists have), the `SPREAD_QUANTILES` of the distances there."""
    found = {}
    for rank in SPREAD_RANKS:
        column = lists.distances[:, rank - 1 : rank]
        column = column[column.isfinite()]
        if len(column):
            quantiles = np.quantile(column.double().numpy(), SPREAD_QUANTILES)
            found[str(rank)] = [float(value) for value in quantiles]
    return found


def write_trained_on(record: TrainedOn, folder: Path) -> None:
    """Write trained_on.json into a model folder, atomically."""
    write_json(folder / TRAINED_ON, asdict(record))


def read_trained_on(folder: Path) -> TrainedOn | None:
    """The record in a model folder; None for a folder without one. Raises BadInput for a file that is none."""
    path = folder / TRAINED_ON
    if not path.is_file():
        return None
    try:
        record = TrainedOn(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is no record of a training ({error}); train the model again") from error
    return record


def different_setting(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting, with its values, in which two extractors differ so that their embeddings do; None for none.

    Of the weights, a digest, the beginning is given.
    """
    names = sorted((ours.keys() | theirs.keys()) - set(_NOT_COMPARED))
    different = [name for name in names if ours.get(name) != theirs.get(name)]
    if ours.get("weights") != theirs.get("weights"):
        different.append("weights")
    if not different:
        return None
    name = different[0]
    was, now = (settings.get(name) for settings in (ours, theirs))
    return (name, was, now) if name != "weights" else (name, str(was)[:12], str(now)[:12])
