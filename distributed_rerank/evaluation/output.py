"""The files of an evaluation: figures, a row per query, rejects, re-ranked lists, the report."""

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from distributed_rerank import __version__
from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.probability import probabilities
from distributed_rerank.data import tables
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.relevance import are_relevant
from distributed_rerank.evaluation.why import Explain
from distributed_rerank.report.page import build_report
from distributed_rerank.report.query_examples import SHOWN_CANDIDATES, Candidate, Strip, choose_queries
from distributed_rerank.report.why import Why
from distributed_rerank.storage.files import write_json
from distributed_rerank.tensors.candidate_lists import Ranking

QUERIES_PER_BATCH = 1 << 12
SHOWN_SUSPECTS = 12
SECRETS = ("--webhook",)
"""Options whose value a report, which is shared, does not show."""


@dataclass(frozen=True)
class Result:
    """Metrics, one row per query, and the rankings of the queries in item order."""

    metrics: dict[str, Any]
    per_query: pd.DataFrame
    catalogue: Catalogue
    query_items: Tensor
    before: Ranking
    after: Ranking | None
    chain: Chain
    searched: Ranking
    """The candidates that the model looked at, with their first-stage distances."""
    explain: Explain | None = None
    places: pd.DataFrame | None = None
    """Of `embedding_map`."""


def write(
    folder: Path, result: Result, rejects: pd.DataFrame, settings: dict[str, Any], timings: dict[str, Any]
) -> None:
    """Write metrics.json, per_query.parquet, rejects.parquet, report.html and, if re-ranked, reranked.parquet."""
    write_json(folder / "metrics.json", result.metrics)
    per_query = pa.Table.from_pandas(result.per_query, preserve_index=False)
    tables.write_table(folder / "per_query.parquet", per_query, "per_query")
    tables.write_table(folder / "rejects.parquet", pa.Table.from_pandas(rejects, preserve_index=False), "rejects")
    if result.after is not None:
        tables.write_batches(folder / "reranked.parquet", _batches(result, result.after), "candidates")
    build_report(
        result.metrics,
        result.per_query,
        _strips(result),
        settings | {"chain": result.metrics["chain"], "catalogue": result.catalogue.source},
        _environment(),
        folder / "report.html",
        rejects,
        timings,
        _suspect_images(result),
        result.places,
    )


def _batches(result: Result, ranking: Ranking) -> Iterator[pa.Table]:
    """The lists of all queries as candidates tables of some queries each."""
    for rows in torch.arange(len(result.query_items)).split(QUERIES_PER_BATCH):
        yield candidates_table(ranking[rows], result.catalogue.ids)


def _suspect_images(result: Result) -> list[tuple[ImageRef, ImageRef]]:
    """The two images of each of the first pairs of labels to check."""
    pairs = result.metrics["suspects"][:SHOWN_SUSPECTS]
    sides = [
        result.catalogue.images(result.catalogue.items_of([pair[side] for pair in pairs]))
        for side in ("query_id", "gallery_id")
    ]
    return list(zip(*sides, strict=True))


def _strips(result: Result) -> list[Strip]:
    """Image strips of the queries that the report shows."""
    chosen = [id for group in choose_queries(result.per_query) for id in group]
    rows = np.searchsorted(result.query_items.numpy(), result.catalogue.items_of(chosen))
    return [_strip(result, row) for row in rows.tolist()]


def _strip(result: Result, row: int) -> Strip:
    catalogue, item = result.catalogue, int(result.query_items[row])

    def side(ranking: Ranking | None, chain: Chain) -> list[Candidate]:
        if ranking is None:
            return []
        lists = ranking[torch.tensor([row])]
        items = lists.items[0, :SHOWN_CANDIDATES]
        items = items[items >= 0].numpy()
        is_relevant = are_relevant(catalogue, item, items)
        words = nearness(lists.distances[0, : len(items)], chain)
        return [Candidate(*cells) for cells in zip(catalogue.images(items), is_relevant.tolist(), words, strict=True)]

    before, after = side(result.before, Chain()), side(result.after, result.chain)
    query = catalogue.images(np.array([item]))[0]
    return Strip(query, before, after, _why(result, row, query, (after or before)[:1]))


def _why(result: Result, row: int, query: ImageRef, first: Sequence[Candidate]) -> Why | None:
    """Why the model puts the first candidate first; None where it has not looked at it, or cannot say."""
    if result.explain is None or not first:
        return None
    lists = result.searched[torch.tensor([row])]
    (place,) = (lists.items[0] == int(result.catalogue.items_of([first[0].image.id])[0])).nonzero(as_tuple=True)
    return result.explain(query, first[0].image, float(lists.distances[0, place[0]])) if len(place) else None


def nearness(distances: Float[Tensor, " candidate"], chain: Chain) -> list[str]:
    """How near candidates are, in words: the probability of a match, else the distance where it is one.

    A fused distance may be below zero, which tells a reader nothing.
    """
    found = probabilities(chain, distances)
    if found is not None:
        return [f"p {value:.2f}" for value in found.tolist()]
    return [f"d {value:.3f}" if value >= 0 else "" for value in distances.tolist()]


def command_of(words: Sequence[str]) -> str:
    """The command that this process was started with, without what is secret; "" where it is none of this package."""
    program, *rest = words
    path = Path(program)
    if path.parts[-2:] == ("distributed_rerank", "__main__.py"):
        name = "python -m distributed_rerank"
    elif path.name == "distributed-rerank":
        name = path.name
    elif path.parent.name == "jobs" and path.suffix == ".py":
        name = f"python jobs/{path.name}"
    else:
        return ""
    for place, word in enumerate(rest):
        option, is_joined, _ = word.partition("=")
        if option in SECRETS and is_joined:
            rest[place] = f"{option}=..."
        elif place > 0 and rest[place - 1] in SECRETS:
            rest[place] = "..."
    return f"{name} {shlex.join(rest)}".strip()


def _environment() -> dict[str, str]:
    """When, by which command and with what this process makes the report."""
    # The package itself may run from a folder that is not installed: a cluster's working directory.
    versions = {"distributed_rerank": __version__, "timm": importlib.metadata.version("timm")}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": command_of(sys.argv),
        **versions,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
