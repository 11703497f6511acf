"""docs/tutorial.py from a folder of photos to the answer for one photo; and what docs/faq.md says can be looked up."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_rerank import command_line
from distributed_rerank.config.jobs import JOBS
from distributed_rerank.config.options import options_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_tutorial_ends_with_a_report_and_an_answer(tmp_path: Path) -> None:
    command = [sys.executable, "docs/tutorial.py", "--out", str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert metrics["n_queries"] == 144
    assert (tmp_path / "out" / "evaluation" / "report.html").stat().st_size > 10_000
    lines = done.stdout.splitlines()
    said = next(line for line in lines if line.startswith("mAP@10 "))
    assert said.split()[1] == f"{metrics['first_stage']['map@10']:.3f}"
    answers = lines[lines.index(said) + 1 :]
    assert len(answers) == 5
    assert all(re.match(r"photos/.+\.jpg +(\d\.\d\d)?", line) for line in answers), answers


def test_options_that_the_questions_and_recipes_name_are_there() -> None:
    flags = {f"--{option.flag}" for name in JOBS for option in options_of(command_line.job_type(name))}
    for page in ("faq.md", "databases.md"):
        named = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", (ROOT / "docs" / page).read_text(encoding="utf-8")))
        assert named
        assert named <= flags, page
