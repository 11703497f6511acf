"""What a report says of itself."""

import importlib.metadata

import pytest

from distributed_rerank import __version__
from distributed_rerank.evaluation.output import _environment, command_of


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (
            ["/venv/bin/distributed-rerank", "evaluate", "--out", "my runs"],
            "distributed-rerank evaluate --out 'my runs'",
        ),
        (["/x/distributed_rerank/__main__.py", "evaluate"], "python -m distributed_rerank evaluate"),
        (["jobs/evaluate.py", "--seed", "1"], "python jobs/evaluate.py --seed 1"),
        (["/venv/bin/pytest", "-q"], ""),
        (["-c"], ""),
    ],
)
def test_command_is_shown_where_it_is_one_of_this_package(words: list[str], command: str) -> None:
    assert command_of(words) == command


@pytest.mark.parametrize("secret", [["--webhook", "https://x/key"], ["--webhook=https://x/key"]])
def test_command_does_not_show_a_secret(secret: list[str]) -> None:
    found = command_of(["jobs/scheduled_evaluation.py", *secret, "--runs", "r"])
    assert "key" not in found
    assert found.endswith("--runs r")


def test_a_folder_that_is_not_installed_writes_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster, whose workers get the project as a working directory."""
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "distributed_rerank":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _environment()["distributed_rerank"] == __version__
