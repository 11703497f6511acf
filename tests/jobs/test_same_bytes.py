"""The same bytes from one process and from 1, 2 and 3 Ray workers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from job_files import EXTRACTOR, SMALL_BLOCKS, bytes_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_files_are_equal_for_any_number_of_workers(
    catalogue_path: Path, models: dict[str, Path], run_job: Callable, local_ray: None, tmp_path: Path
) -> None:
    def evaluate(name: str, *arguments: object, on_ray: bool) -> dict[str, bytes]:
        outcome = run_job(
            "evaluate", "--catalogue", catalogue_path, "--out", tmp_path / name, *EXTRACTOR, *SMALL_BLOCKS,
            "--model", models["concat"], *arguments, on_ray=on_ray,
        )  # fmt: skip
        assert outcome.code == 0, outcome.errors
        return bytes_of(tmp_path / name)

    expected = evaluate("one process", on_ray=False)
    assert set(expected) == {"metrics.json", "per_query.parquet", "reranked.parquet", "rejects.parquet"}
    for n in (1, 2, 3):
        assert evaluate(f"{n} workers", "--num-workers", n, on_ray=True) == expected
    rounds = evaluate("small budget", "--encoding-gb", 0.00005, "--decode-threads", 2, on_ray=False)
    assert rounds == expected
