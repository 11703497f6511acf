"""The Parquet file with one row for every scheduled run, in the order in which they finished.

It holds no time; a run id is usually a date. To append a row, a new file is written under a lock and replaces the old
one, so a reader always sees a whole file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locks
from distributed_rerank.storage.files import atomic_path

ACCEPTED = "accepted"
"""The verdict of a run whose result somebody accepted, whatever it lost."""
COLUMNS = pa.schema(
    {
        "run_id": pa.string(),
        "verdict": pa.string(),
        "exit_code": pa.int64(),
        "reason": pa.string(),
        "metric": pa.string(),
        "tolerance": pa.float64(),
        "change_from_baseline": pa.float64(),
        "change_from_previous": pa.float64(),
        "catalogue": pa.string(),
        "model": pa.string(),
        "n_queries": pa.int64(),
    }
)
"""The fixed columns. A float64 column follows for every metric of the final ranking, null where a run lacks it."""


def read_history(path: Path) -> pd.DataFrame:
    """All rows in the order appended; none if there is no file. Raises BadInput for another kind of file."""
    if not path.exists():
        return COLUMNS.empty_table().to_pandas()
    return _read(path).to_pandas()


def append(path: Path, row: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Add a run. Nothing changes if its run_id is there already.

    `row` has exactly the columns of `COLUMNS`. Blocks while another process appends.
    """
    assert set(row) == set(COLUMNS.names), f"a row of the history has {sorted(row)}"
    schema = pa.schema([*COLUMNS, *(pa.field(key, pa.float64()) for key in metrics)])
    new = pa.Table.from_pylist([{**row, **metrics}], schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locks.wait_for(path.with_name(f".{path.name}.lock")):
        old = _read(path) if path.exists() else None
        if old is not None and row["run_id"] in old["run_id"].to_pylist():
            return
        whole = new if old is None else pa.concat_tables([old, new], promote_options="default").combine_chunks()
        with atomic_path(path) as temporary:
            pq.write_table(whole, temporary)


def accept(path: Path, run_id: str) -> None:
    """Change a run's regression to `accepted`, exit code 0."""
    with locks.wait_for(path.with_name(f".{path.name}.lock")):
        table = _read(path)
        rows = [
            row | {"verdict": ACCEPTED, "exit_code": 0, "reason": f"{row['reason']}; accepted by --accept-baseline"}
            if row["run_id"] == run_id and row["verdict"] != ACCEPTED
            else row
            for row in table.to_pylist()
        ]
        with atomic_path(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, table.schema), temporary)


def references(history: pd.DataFrame, run_id: str) -> tuple[str | None, str | None]:
    """The runs that `run_id` is compared with: the last before it without a regression, and the last accepted one."""
    ids = history["run_id"].tolist()
    before = history.head(ids.index(run_id)) if run_id in ids else history
    good, accepted = before[before["exit_code"] == 0], before[before["verdict"] == ACCEPTED]
    last = [str(rows["run_id"].tolist()[-1]) if len(rows) else None for rows in (good, accepted)]
    return last[0], last[1]


def merge(path: Path, other: bytes) -> None:
    """Add what another copy of the history, the file `other`, has beyond `path`: runs, and runs that were accepted."""
    theirs = pq.ParquetFile(pa.BufferReader(other)).read()
    whole = theirs
    if path.exists():
        own = _read(path)
        rows = {row["run_id"]: row for row in own.to_pylist()}
        news = {row["run_id"]: row for row in theirs.to_pylist()}
        rows |= {run_id: row for run_id, row in news.items() if run_id not in rows or row["verdict"] == ACCEPTED}
        schema = pa.unify_schemas([own.schema, theirs.schema])
        whole = pa.Table.from_pylist(list(rows.values()), schema)
    with atomic_path(path) as temporary:
        pq.write_table(whole, temporary)


def _read(path: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"--history {path} is no Parquet file ({error}); give another file") from error
    missing = [name for name in COLUMNS.names if name not in table.column_names]
    if missing:
        raise BadInput(f"--history {path} is no history of runs: columns missing {missing}; give another file")
    return table
