"""docs/notebooks: executed in order, with the results that their texts promise; those that the files keep are whole."""

import json
import re
import shlex
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pandas as pd
import pytest
from jobs.conftest import environment_of_jobs

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def output_of(notebook: dict[str, Any], words: str) -> str:
    """All text that the cell with these words has written."""
    (cell,) = [cell for cell in notebook["cells"] if words in "".join(cell["source"]) and cell["cell_type"] == "code"]
    parts = [part.get("text") or part["data"]["text/plain"] for part in cell["outputs"]]
    return "".join("".join(part) for part in parts)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_file_keeps_the_results_of_a_whole_execution(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    text = path.read_text("utf-8")
    assert path.stat().st_size < 500_000
    assert not re.search(r"Traceback|/home/|/root/|/tmp/|/work/", text), "an error, or a path of some machine"


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_notebooks_are_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="nbclient is absent: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="ipykernel is absent: pip install nbclient ipykernel")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "distributed-rerank"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m distributed_rerank "$@"\n')
    command.chmod(0o755)
    environment = environment_of_jobs()
    for name, value in (environment | {"PATH": f"{command.parent}:{environment['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    done = run_path(str(NOTEBOOKS / "execute.py"))["execute"](tmp_path)
    own, database, compared, cluster = (json.loads(path.read_text("utf-8")) for path in done)
    metrics = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert f"{metrics['first_stage']['map@10']:.3f}" in output_of(own, "recall@10")
    assert len(re.findall(r"id='photos/", output_of(own, "top_k=5"))) == 5
    table = pd.read_csv(tmp_path / "out" / "photos.csv")
    assert output_of(database, "client.count") == str((table["split"] == "validation").sum())
    assert "re-ranked" in output_of(database, "right = {")
    assert "| evaluation | evaluation1 |" in (tmp_path / "out" / "comparison" / "comparison.md").read_text()
    assert output_of(compared, "Markdown(")
    assert "the same bytes" in output_of(cluster, "cmp ")
