"""The plan before a run: its figures by hand, and a refusal where it cannot fit."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_files import EXTRACTOR

from distributed_rerank.errors import BadInput
from distributed_rerank.jobs.plan import Plan, check, memory_bytes

TEN_MILLION = Plan(
    n_images=10_000_000, n_embedded=10_000_000, n_queries=1_000_000, n_items=100, top_n=50, images_per_block=256,
    queries_per_block=1024, n_workers=100, dim=384,
)  # fmt: skip


def test_figures_of_ten_million_images() -> None:
    assert TEN_MILLION.n_pairs == 50_000_000
    lines = {line.split()[0]: line for line in TEN_MILLION.lines(cpus=2)}
    assert "10,000,000, 10,000,000 of them to read in up to 39,063 blocks of 256" in lines["images"]
    assert "1,000,000 with 100 candidates each, in 977 blocks" in lines["queries"]
    assert "15.4 GB (384 numbers an image)" in lines["embeddings"]
    assert "at least 27.8 to read" in lines["minutes"], "10^7 / 60 / 100 / 60"
    own = 1_400_000_000 + 10**7 * 300 + 10**6 * 100 * 24
    assert TEN_MILLION.driver_bytes == own
    training = replace(TEN_MILLION, holds_embeddings=True)
    assert training.driver_bytes == own + 4 * 10**7 * 384 * 4
    assert training.lines(2)[-1].endswith("lists, 4 copies of the embeddings)")


def test_images_of_pairs_are_read_where_embeddings_are_given() -> None:
    given = replace(TEN_MILLION, n_embedded=0, n_for_pairs=10_000_000)
    lines = {line.split()[0]: line for line in given.lines(cpus=2)}
    assert lines["pairs"].endswith("50,000,000 (top 50), for which up to 10,000,000 images are read")
    assert "at least 2.8 to read" in lines["minutes"], "the queries, 10^6 / 60 / 100 / 60"
    few = replace(given, n_for_pairs=600)
    assert "at least 0.0 to read" in few.lines(cpus=2)[5]
    assert few.lines(cpus=2)[5].startswith("minutes")


def test_a_long_exact_search_names_the_option() -> None:
    assert not [line for line in TEN_MILLION.lines(2) if "--search" in line], "nothing is searched for, or not exactly"
    (line,) = [line for line in replace(TEN_MILLION, n_searched=10**7).lines(2) if "--search" in line]
    assert line == "search      13 minutes on CPUs; --search approximate is quicker", "10^6 x 10^7 x 384 / 5e10 / 6000"
    assert len(replace(TEN_MILLION, n_searched=7 * 10**6).lines(2)) == len(TEN_MILLION.lines(2)), "9 minutes"


def test_plan_that_does_not_fit_is_refused_with_the_option_to_change() -> None:
    check(TEN_MILLION, 16 * 10**9)
    with pytest.raises(BadInput, match=r"need 6.8 GB in this process, the machine has 4 GB; .* lower --n-items"):
        check(TEN_MILLION, 4 * 10**9)
    assert memory_bytes() > 10**8


def test_every_job_tells_its_plan_before_it_works(
    catalogue_path: Path,
    models: dict[str, Path],
    run_job: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    given = ["--catalogue", catalogue_path]
    assert run_job("embed", *given, "--out", tmp_path / "embeddings", *EXTRACTOR).code == 0
    (plan,) = [message for message in caplog.messages if message.startswith("plan")]
    assert "images      88, 88 of them to read in up to 1 blocks of 256" in plan
    assert "workers     none, this process" in plan
    caplog.clear()
    model = ["--embeddings", tmp_path / "embeddings", "--model", models["concat"]]
    assert run_job("evaluate", *given, *model, "--out", tmp_path / "out").code == 0
    assert caplog.messages[0].startswith("plan"), "before anything else"
    assert "images      48, 0 of them to read" in caplog.messages[0]
    assert "queries     36 with 100 candidates each" in caplog.messages[0]
    assert "pairs       216 (top 6), for which up to 48 images are read" in caplog.messages[0]
    assert "512 numbers an image)" in caplog.messages[0] or "numbers an image)" in caplog.messages[0]
