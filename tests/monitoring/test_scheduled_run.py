"""A run's verdict: planted regressions are found, equal runs are not, a second start changes nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from planted_runs import planted_catalogue, planted_ranking, write_run

from distributed_rerank.config.evaluation import MeasureConfig
from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
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


def test_grown_catalogue_is_compared_on_the_common_queries_and_that_is_said(tmp_path: Path) -> None:
    catalogues = [planted_catalogue(tmp_path / f"catalogue {n}", n_labels=n) for n in (60, 61)]
    run(schedule(tmp_path, "1"), catalogues[0], GOOD)
    outcome = run(schedule(tmp_path, "2"), catalogues[1], WORSE)
    assert (outcome.exit_code, outcome.verdict) == (3, "regression")
    assert all(catalogue.digest()[:16] in outcome.reason for catalogue in catalogues)
    assert "240 common queries, queries left out: 4 new" in outcome.reason
    # The same difference as without the new label, for it is left out: an independent computation.
    before, after = (
        pd.read_parquet(tmp_path / "runs" / number / "per_query.parquet").set_index("query_id")["map@10_before"]
        for number in ("1", "2")
    )
    expected = (after.loc[before.index] - before).mean()
    assert outcome.changes["previous"] == pytest.approx(expected)


def test_queries_whose_label_was_corrected_are_left_out_and_counted(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    table = pd.read_csv(tmp_path / "catalogue" / "table.csv", dtype=str)
    table.loc[:3, "label"] = "corrected"
    table.to_csv(tmp_path / "corrected.csv", index=False)
    corrected = read_catalogue(str(tmp_path / "corrected.csv"), purpose="evaluation")
    outcome = run(schedule(tmp_path, "2"), corrected, GOOD)
    assert "236 common queries, queries left out: 4 with another label" in outcome.reason
    assert outcome.exit_code == 0


def test_catalogue_without_a_common_query_cannot_be_compared_and_is_said(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=5)
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    table = pd.read_csv(tmp_path / "catalogue" / "table.csv", dtype=str)
    table["id"] = "new " + table["id"]
    table.to_csv(tmp_path / "new.csv", index=False)
    other = read_catalogue(str(tmp_path / "new.csv"), purpose="evaluation")
    outcome = run(schedule(tmp_path, "2"), other, WORSE)
    assert (outcome.exit_code, outcome.verdict) == (0, "not compared")
    assert "measured no query in common" in outcome.reason


def test_regression_fails_every_night_until_it_is_accepted(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    write_run(tmp_path / "baseline", catalogue, planted_ranking(catalogue, GOOD, seed=3))
    for pinned in ({}, {"baseline": tmp_path / "baseline"}):
        folder = tmp_path / f"nights {len(pinned)}"
        assert run(schedule(folder, "1", **pinned), catalogue, GOOD).exit_code == 0
        for number in ("2", "3"):
            outcome = run(schedule(folder, number, **pinned), catalogue, WORSE)
            assert outcome.exit_code == 3
            assert "the last run without a regression, 1," in outcome.reason
        accepted = conclude(schedule(folder, "3", accept_baseline=True, **pinned))
        assert (accepted.exit_code, accepted.verdict) == (0, "accepted")
        assert "accepted by --accept-baseline" in accepted.reason
        fourth = run(schedule(folder, "4", **pinned), catalogue, WORSE)
        assert (fourth.exit_code, fourth.verdict) == (0, "no regression")
        assert "against the accepted run 3" in fourth.reason
        assert run(schedule(folder, "5", **pinned), catalogue, {**WORSE, "cups": 0.9}).exit_code == 3
        assert conclude(schedule(folder, "2", **pinned)).exit_code == 3, "what was said of an earlier night stays"


def test_previous_run_whose_folder_is_gone_cannot_be_compared_and_is_said(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=5)
    run(schedule(tmp_path, "1"), catalogue, GOOD)
    shutil.rmtree(tmp_path / "runs/1")
    assert "is gone" in run(schedule(tmp_path, "2"), catalogue, GOOD).reason


def test_check_refuses_a_baseline_without_a_common_query_before_any_work(tmp_path: Path) -> None:
    catalogue, other = (planted_catalogue(tmp_path / f"catalogue {n}", n_labels=n) for n in (5, 6))
    write_run(tmp_path / "baseline", other, planted_ranking(other, {}))
    config = schedule(tmp_path, "1", baseline=tmp_path / "baseline")
    check(config, catalogue, MeasureConfig())
    table = pd.read_csv(tmp_path / "catalogue 5" / "table.csv", dtype=str)
    table["id"] = "new " + table["id"]
    table.to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(BadInput, match=r"--baseline .*baseline has no query in common with this catalogue"):
        check(config, read_catalogue(str(tmp_path / "new.csv"), purpose="evaluation"), MeasureConfig())


def test_check_refuses_a_metric_that_is_not_measured(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=5)
    with pytest.raises(BadInput, match=r"--metric cmc@3 is not measured; choose one of cmc@1, .*map@10"):
        check(schedule(tmp_path, "1", metric="cmc@3"), catalogue, MeasureConfig())
    check(schedule(tmp_path, "1", metric="cmc@3"), catalogue, MeasureConfig(ks=(3,)))


@pytest.mark.parametrize("values", [{"run_id": "a/b"}, {"run_id": ".."}, {"run_id": ""}, {"tolerance": -0.1}])
def test_schedule_of_a_bad_id_or_tolerance_is_refused(tmp_path: Path, values: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        schedule(tmp_path, **{"run_id": "1", **values})  # pyright: ignore[reportArgumentType]
