"""A run's verdict: planted regressions are found, equal runs are not, a second start changes nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from planted_runs import planted_catalogue, planted_ranking, write_run

from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.scheduled_run import Outcome, check, conclude

GOOD = {"books": 0.1, "cups": 0.1, "toys": 0.1}
WORSE = {"books": 0.1, "cups": 0.1, "toys": 0.6}


def schedule(folder: Path, run_id: str, **other: object) -> ScheduleConfig:
    config = ScheduleConfig(history=folder / "history.parquet", runs=folder / "runs", run_id=run_id)
    return dataclasses.replace(config, **other)  # pyright: ignore[reportArgumentType]


def run(config: ScheduleConfig, catalogue: Catalogue, miss: dict[str, float]) -> Outcome:
    if not config.folder.exists():
        write_run(config.folder, catalogue, planted_ranking(catalogue, miss, seed=3))
    return conclude(config)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_planted_regression_of_two_points_exits_3_and_names_what_fell(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    write_run(tmp_path / "baseline", catalogue, planted_ranking(catalogue, GOOD, seed=3))
    first = run(schedule(tmp_path, "1", baseline=tmp_path / "baseline"), catalogue, GOOD)
    assert first.exit_code == 0
    assert "there is no previous run" in first.reason
    second = run(schedule(tmp_path, "2", baseline=tmp_path / "baseline"), catalogue, WORSE)
    found = json.loads((tmp_path / "runs" / "2" / "verdict.json").read_text())
    difference = found["against"]["baseline"]["difference"]["map@10"]
    assert difference["mean"] < -0.02
    assert (second.exit_code, second.verdict) == (3, "regression")
    low, high = (f"−{-end:.3f}" for end in difference["ci95"])
    assert f"mAP@10 −{-difference['mean']:.3f} (95 % interval {low} to {high}) against the baseline" in second.reason
    assert second.reason.count("worst category: 'toys'") == 2, "against the baseline and the previous run"
    rows = pd.read_parquet(tmp_path / "history.parquet")
    assert rows["exit_code"].tolist() == [0, 3]
    assert rows["change_from_previous"][1] == pytest.approx(difference["mean"])
    report = (tmp_path / "runs" / "2" / "report.html").read_text()
    assert "worst category: &#39;toys&#39;" in report
    assert "<svg" in report
    assert "regression" in (tmp_path / "history.html").read_text()


def test_same_rankings_twice_are_no_regression(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    outcomes = [run(schedule(tmp_path, run_id), catalogue, WORSE) for run_id in ("1", "2")]
    assert [outcome.verdict for outcome in outcomes] == ["not compared", "no regression"]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]


@pytest.mark.parametrize("config", [{"tolerance": 0.9}, {"metric": "recall@10"}])
def test_loss_within_the_tolerance_or_in_another_metric_is_no_regression(
    tmp_path: Path, config: dict[str, object]
) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    assert run(schedule(tmp_path, "2", **config), catalogue, WORSE).exit_code == 0


def test_second_start_of_a_done_run_changes_no_byte_and_ends_alike(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    first = run(schedule(tmp_path, "2"), catalogue, WORSE)
    before = files_of(tmp_path)
    assert conclude(schedule(tmp_path, "2")) == first
    assert files_of(tmp_path) == before
    run(schedule(tmp_path, "3"), catalogue, WORSE)
    conclude(schedule(tmp_path, "2"))
    assert (tmp_path / "runs/2/trend.svg").read_bytes() == before["runs/2/trend.svg"]


def test_run_killed_before_its_row_was_appended_gives_the_same_bytes(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    history = (tmp_path / "history.parquet").read_bytes()
    run(schedule(tmp_path, "2"), catalogue, WORSE)
    whole = files_of(tmp_path)
    (tmp_path / "history.parquet").write_bytes(history)
    for name in ("trend.svg", "verdict.json"):
        (tmp_path / "runs/2" / name).unlink()
    conclude(schedule(tmp_path, "2"))
    assert files_of(tmp_path) == whole


def test_previous_run_of_another_catalogue_cannot_be_compared_and_is_said(tmp_path: Path) -> None:
    catalogues = [planted_catalogue(tmp_path / f"catalogue {n}", n_labels=n) for n in (5, 6)]
    run(schedule(tmp_path, "1"), catalogues[0], GOOD)
    outcome = run(schedule(tmp_path, "2"), catalogues[1], WORSE)
    assert (outcome.exit_code, outcome.verdict) == (0, "not compared")
    assert all(catalogue.digest()[:16] in outcome.reason for catalogue in catalogues)


def test_previous_run_whose_folder_is_gone_cannot_be_compared_and_is_said(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=5)
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    shutil.rmtree(tmp_path / "runs/1")
    assert "is gone" in run(schedule(tmp_path, "2"), catalogue, GOOD).reason


def test_check_refuses_a_baseline_of_another_catalogue_before_any_work(tmp_path: Path) -> None:
    catalogue, other = (planted_catalogue(tmp_path / f"catalogue {n}", n_labels=n) for n in (5, 6))
    write_run(tmp_path / "baseline", other, planted_ranking(other, {}))
    config = schedule(tmp_path, "1", baseline=tmp_path / "baseline")
    with pytest.raises(BadInput, match=f"{other.digest()[:16]}, this run on {catalogue.digest()[:16]}"):
        check(config, catalogue, (1, 5, 10))
    check(config, other, (1, 5, 10))


def test_check_refuses_a_metric_that_is_not_measured(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=5)
    with pytest.raises(BadInput, match=r"--metric cmc@3 is not measured; choose one of cmc@1, .*map@10"):
        check(schedule(tmp_path, "1", metric="cmc@3"), catalogue, (1, 5, 10))
    check(schedule(tmp_path, "1", metric="cmc@3"), catalogue, (3,))


@pytest.mark.parametrize("values", [{"run_id": "a/b"}, {"run_id": ".."}, {"run_id": ""}, {"tolerance": -0.1}])
def test_schedule_of_a_bad_id_or_tolerance_is_refused(tmp_path: Path, values: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        schedule(tmp_path, **{"run_id": "1", **values})  # pyright: ignore[reportArgumentType]
