"""Images that could not be read, and why: the table `rejects` and the share of them that a run accepts. Layer 2."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa

from distributed_rerank.data import tables
from distributed_rerank.errors import BadInput


@dataclass(frozen=True)
class Reject:
    """An image that could not be read, and why."""

    id: str
    path: str
    reason: str


def check_rejects(rejects: Sequence[Reject], n_images: int, max_rejects: float, table: str) -> None:
    """Raise BadInput, naming count, share, first reasons and the `table` with all, when more than the share
    `max_rejects` of `n_images` images could not be read."""
    if len(rejects) <= max_rejects * n_images:
        return
    first = "; ".join(f"{reject.id}: {reject.reason}" for reject in rejects[:3])
    raise BadInput(
        f"{len(rejects)} of {n_images} images ({len(rejects) / n_images:.2%}) cannot be read, more than "
        f"max_rejects={max_rejects:.2%} allows ({first}); all reasons are in {table}; "
        "repair them or raise --max-rejects"
    )


def reject_table(rejects: Sequence[Reject], stage: str) -> pa.Table:
    """The rows of the rejects table for images rejected in `stage`, in the order given."""
    columns = {
        "id": [reject.id for reject in rejects],
        "path": [reject.path for reject in rejects],
        "stage": [stage] * len(rejects),
        "reason": [reject.reason for reject in rejects],
    }
    return pa.table(columns, schema=tables.SCHEMAS["rejects"])


def rejects_of(table: pa.Table) -> list[Reject]:
    """The images of a rejects table."""
    return [Reject(row["id"], row["path"], row["reason"]) for row in table.to_pylist()]


def all_rejects(embedding: Sequence[Reject], scoring: Sequence[Reject]) -> pd.DataFrame:
    """The rejects table: each image once, by id, with the stage that met it first."""
    parts = [reject_table(embedding, "embed").to_pandas(), reject_table(scoring, "score").to_pandas()]
    return pd.concat(parts, ignore_index=True).drop_duplicates("id").sort_values("id", ignore_index=True)
