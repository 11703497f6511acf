"""What an evaluation leaves on disk: figures, a row per query, rejects, re-ranked lists, the report. Layer 3."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from distributed_rerank.data import artifacts, tables
from distributed_rerank.data.candidates import CandidateLists, candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.rejects import Reject, reject_table
from distributed_rerank.procedures.report.page import build_report
from distributed_rerank.procedures.report.strips import SHOWN_CANDIDATES, Candidate, Strip, choose_queries
from distributed_rerank.tensors.knn import Neighbours


@dataclass(frozen=True)
class Result:
    """What is written: metrics, one row per query, and the rankings of the queries in item order."""

    metrics: dict[str, Any]
    per_query: pd.DataFrame
    catalogue: Catalogue
    query_items: Tensor
    before: Neighbours
    after: Neighbours | None


def all_rejects(embedding: Sequence[Reject], scoring: Sequence[Reject]) -> pd.DataFrame:
    """The rejects table: each image once, by id, with the stage that met it first."""
    parts = [reject_table(embedding, "embed").to_pandas(), reject_table(scoring, "score").to_pandas()]
    return pd.concat(parts, ignore_index=True).drop_duplicates("id").sort_values("id", ignore_index=True)


def write(folder: Path, result: Result, rejects: pd.DataFrame, settings: dict[str, Any]) -> None:
    """metrics.json, per_query.parquet, rejects.parquet, reranked.parquet where there was a re-ranking, report.html."""
    artifacts.write_json(folder / "metrics.json", result.metrics)
    per_query = pa.Table.from_pandas(result.per_query, preserve_index=False)
    tables.write_table(folder / "per_query.parquet", per_query, "per_query")
    tables.write_table(folder / "rejects.parquet", pa.Table.from_pandas(rejects, preserve_index=False), "rejects")
    if result.after is not None:
        ranked = CandidateLists(result.query_items.numpy(), result.after.items.numpy(), result.after.distances.numpy())
        tables.write_table(folder / "reranked.parquet", candidates_table(ranked, result.catalogue.ids), "candidates")
    build_report(
        result.metrics,
        result.per_query,
        _strips(result),
        settings | {"chain": result.metrics["chain"], "catalogue": result.catalogue.source},
        _environment(),
        folder / "report.html",
        rejects,
    )


def _strips(result: Result) -> list[Strip]:
    """Image strips of the queries that the report shows."""
    chosen = choose_queries(result.per_query)
    ids = result.catalogue.ids[result.query_items.numpy()].tolist()
    row_of = {id: row for row, id in enumerate(ids)}
    return [_strip(result, row_of[id]) for group in chosen for id in group]


def _strip(result: Result, row: int) -> Strip:
    catalogue, item = result.catalogue, int(result.query_items[row])

    def side(ranking: Neighbours | None) -> list[Candidate]:
        if ranking is None:
            return []
        items = ranking.items[row, :SHOWN_CANDIDATES]
        items = items[items >= 0].numpy()
        is_relevant = catalogue.labels[items] == catalogue.labels[item]
        distances = ranking.distances[row, : len(items)].tolist()
        refs = catalogue.images(items)
        return [Candidate(*cells) for cells in zip(refs, is_relevant.tolist(), distances, strict=True)]

    return Strip(catalogue.images(np.array([item]))[0], side(result.before), side(result.after))


def _environment() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
