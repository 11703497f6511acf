"""The history of runs: one row a run, appended whole, whoever else appends."""

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.history import COLUMNS, append, read_history


def row(run_id: str, **other: Any) -> dict[str, Any]:
    texts = {"verdict": "no regression", "reason": "", "metric": "map@10", "catalogue": "c", "model": None}
    numbers = {"exit_code": 0, "tolerance": 0.005, "change_from_baseline": None, "change_from_previous": None}
    return {"run_id": run_id, **texts, **numbers, "n_queries": 3, **other}


def test_append_keeps_the_order_and_fills_metrics_that_a_run_lacks(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "history.parquet"
    append(path, row("b"), {"map@10": 0.5})
    append(path, row("a"), {"map@10": 0.6, "cmc@3": 0.7})
    found = read_history(path)
    assert found["run_id"].tolist() == ["b", "a"]
    assert found["map@10"].tolist() == [0.5, 0.6]
    assert np.isnan(found["cmc@3"][0])
    assert found.columns.tolist() == [*COLUMNS.names, "map@10", "cmc@3"]


def test_append_of_a_known_run_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "history.parquet"
    append(path, row("a"), {"map@10": 0.5})
    before = path.read_bytes()
    append(path, row("a", exit_code=3), {"map@10": 0.1})
    assert path.read_bytes() == before


def test_append_of_the_same_rows_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for run_id in ("a", "b"):
            append(tmp_path / name, row(run_id), {"map@10": 0.5})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_read_history_of_an_absent_file_has_no_row(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none").empty
    assert read_history(tmp_path / "none").columns.tolist() == COLUMNS.names


@pytest.mark.parametrize("kind", ["text", "another table"])
def test_read_history_of_another_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "history.parquet"
    if kind == "text":
        path.write_text("run_id,verdict\n")
    else:
        pd.DataFrame({"run_id": ["a"]}).to_parquet(path)
    with pytest.raises(BadInput, match="give another file"):
        read_history(path)


def test_append_from_several_processes_loses_no_row(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_append_some, args=(tmp_path / "history.parquet", name)) for name in ("a", "b", "c")
    ]
    for worker in workers:
        worker.start()
    seen: list[int] = []
    stop = threading.Event()
    reader = threading.Thread(target=_read_until, args=(tmp_path / "history.parquet", stop, seen))
    reader.start()
    for worker in workers:
        worker.join()
    stop.set()
    reader.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(read_history(tmp_path / "history.parquet")["run_id"]) == [f"{n}{i}" for n in "abc" for i in range(5)]
    assert seen == sorted(seen), "a reader saw rows disappear"


def _append_some(path: Path, name: str) -> None:
    for number in range(5):
        append(path, row(f"{name}{number}"), {"map@10": 0.5})


def _read_until(path: Path, stop: threading.Event, seen: list[int]) -> None:
    while not stop.wait(0.01):
        seen.append(len(read_history(path)))
