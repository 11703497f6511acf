"""A history in a bucket: every writer's rows are kept, and so is what somebody accepted."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from s3_server import Server

from distributed_rerank.monitoring.history import COLUMNS, accept, append, merge, read_history, references
from distributed_rerank.monitoring.remote_history import RemoteHistory
from distributed_rerank.storage import object_store


def row(run_id: str, exit_code: int = 0) -> dict[str, Any]:
    values = dict.fromkeys(COLUMNS.names)
    verdict = "regression" if exit_code else "no regression"
    return values | {"run_id": run_id, "verdict": verdict, "exit_code": exit_code, "reason": "because"}


def test_two_jobs_that_end_at_once_keep_both_rows(s3: Server, tmp_path: Path) -> None:
    uri = f"{s3.bucket}/history.parquet"
    with RemoteHistory(uri, tmp_path / "one.parquet"):
        append(tmp_path / "one.parquet", row("1"), {"map@10": 0.5})
    with RemoteHistory(uri, tmp_path / "one.parquet"), RemoteHistory(uri, tmp_path / "two.parquet"):
        append(tmp_path / "one.parquet", row("2"), {"map@10": 0.6})
        append(tmp_path / "two.parquet", row("3"), {"map@10": 0.7, "cmc@1": 0.1})
    (tmp_path / "found.parquet").write_bytes(object_store.read(uri))
    found = read_history(tmp_path / "found.parquet")
    assert found["run_id"].tolist() == ["1", "3", "2"]
    assert found["map@10"].tolist() == [0.5, 0.7, 0.6]
    assert found["cmc@1"].isna().tolist() == [True, False, True]


def test_job_that_fails_or_adds_nothing_writes_nothing(s3: Server, tmp_path: Path) -> None:
    uri = f"{s3.bucket}/history.parquet"
    with RemoteHistory(uri, tmp_path / "one.parquet"):
        append(tmp_path / "one.parquet", row("1"), {})
    s3.requests()
    with RemoteHistory(uri, tmp_path / "two.parquet") as history:
        assert history.references("2") == {"1"}
    assert [method for method, _ in s3.requests()] == ["GET"]


def test_accepted_run_wins_over_what_another_copy_says(tmp_path: Path) -> None:
    for name in ("bucket", "own"):
        append(tmp_path / name, row("1", 3), {})
    accept(tmp_path / "own", "1")
    append(tmp_path / "bucket", row("2", 3), {})
    merge(tmp_path / "bucket", (tmp_path / "own").read_bytes())
    found = read_history(tmp_path / "bucket")
    assert found[["run_id", "verdict", "exit_code"]].to_numpy().tolist() == [
        ["1", "accepted", 0],
        ["2", "regression", 3],
    ]
    merge(tmp_path / "own", (tmp_path / "bucket").read_bytes())
    pd.testing.assert_frame_equal(read_history(tmp_path / "own"), found)
    assert pq.read_schema(tmp_path / "own").names == COLUMNS.names


def test_references_are_the_last_good_and_the_last_accepted_run_before(tmp_path: Path) -> None:
    path = tmp_path / "history"
    for run_id, code in (("1", 0), ("2", 3), ("3", 3), ("4", 0), ("5", 3)):
        append(path, row(run_id, code), {})
    assert references(read_history(path), "6") == ("4", None)
    assert references(read_history(path), "4") == ("1", None)
    assert references(read_history(path), "1") == (None, None)
    accept(path, "3")
    assert references(read_history(path), "6") == ("4", "3")
    assert references(read_history(path), "4") == ("3", "3")
