"""Images that could not be read, and why: the table `rejects` and the share of them that a run accepts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from distributed_rerank.data.schemas import SCHEMAS
from distributed_rerank.errors import BadInput

logger = logging.getLogger(__name__)

OUTAGE = "the store does not answer"
"""How the reason begins where the store was at fault and not the image."""
DEFAULT_SHARE = 0.01
"""Of the images that may be unreadable."""
FEW = 5
"""So many may be, whatever their share."""


@dataclass(frozen=True)
class Reject:
    """An image that could not be read, and why."""

    id: str
    path: str
    reason: str


def check_rejects(rejects: Sequence[Reject], n_images: int, max_rejects: float | None, table: str) -> None:
    """Raise BadInput, naming count, share, first reasons and the `table` with all, for too many unreadable images.

    Too many of `n_images` are more than the share `max_rejects`; by default more than 1 %, but five are never too many
    as long as half of the images remain. Where nobody gave a share, no image may be left out because its store did not
    answer. Fewer rejects are told by a warning.
    """
    if not rejects:
        return
    first = "; ".join(f"{reject.id}: {reject.reason}" for reject in rejects[:3])
    n_unreachable = sum(reject.reason.startswith(OUTAGE) for reject in rejects)
    if max_rejects is None and n_unreachable:
        raise BadInput(
            f"{n_unreachable} of {n_images} images were not fetched, because their store does not answer ({first}); "
            f"start the same command again when it does, or leave them out with --max-rejects; all are in {table}"
        )
    share = DEFAULT_SHARE if max_rejects is None else max_rejects
    least = min(FEW, n_images / 2) if max_rejects is None else 0
    found = f"{len(rejects)} of {n_images} images ({len(rejects) / n_images:.2%}) cannot be read"
    if len(rejects) > max(share * n_images, least):
        raise BadInput(
            f"{found}, more than max_rejects={share:.2%} allows ({first}); all reasons are in {table}; "
            "repair them or raise --max-rejects"
        )
    # By its name alone: the folder it lies in now gets another name when the run is finished.
    logger.warning("%s AND ARE LEFT OUT (%s); all reasons are in the results' %s", found, first, Path(table).name)


def reject_table(rejects: Sequence[Reject], stage: str) -> pa.Table:
    """The rows of the rejects table for images rejected in `stage`, in the order given."""
    columns = {
        "id": [reject.id for reject in rejects],
        "path": [reject.path for reject in rejects],
        "stage": [stage] * len(rejects),
        "reason": [reject.reason for reject in rejects],
    }
    return pa.table(columns, schema=SCHEMAS["rejects"])


def rejects_of(table: pa.Table) -> list[Reject]:
    """The images of a rejects table."""
    return [Reject(row["id"], row["path"], row["reason"]) for row in table.to_pylist()]


def all_rejects(embedding: Sequence[Reject], scoring: Sequence[Reject]) -> pd.DataFrame:
    """The rejects table: each image once, by id, with the stage that met it first."""
    parts = [reject_table(embedding, "embed").to_pandas(), reject_table(scoring, "score").to_pandas()]
    return pd.concat(parts, ignore_index=True).drop_duplicates("id").sort_values("id", ignore_index=True)
