"""A scheduled evaluation around `evaluate`: checks before it, then verdict, history and trend."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from distributed_rerank.config.evaluation import MeasureConfig
from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.comparison import NothingInCommon, catalogue_change, catalogue_of, compare_runs
from distributed_rerank.monitoring.history import accept, append, read_history, references
from distributed_rerank.monitoring.regression import describe, is_regression
from distributed_rerank.monitoring.trend import write_page, write_trend
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import write_json
from distributed_rerank.tensors import metrics

logger = logging.getLogger(__name__)

EXIT_REGRESSION = 3


@dataclass(frozen=True)
class Outcome:
    """The exit code, and the reason: a sentence for each comparison."""

    exit_code: int
    verdict: str
    reason: str
    changes: Mapping[str, float | None]
    """Of the metric that decides, against `baseline` and `previous`."""


def check(config: ScheduleConfig, catalogue: Catalogue, measure: MeasureConfig) -> None:
    """Raises BadInput, before any work, for an unknown metric and for a baseline that cannot be compared."""
    known = metrics.per_query(torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.int64), measure.ks)
    known = [*known, *(name.partition(":")[2] for name in measure.own_metrics)]
    if config.metric not in known:
        raise BadInput(f"--metric {config.metric} is not measured; choose one of {', '.join(known)}")
    read_history(config.history)
    if config.baseline is not None and catalogue_of(config.baseline) != catalogue.digest():
        known_ids = set(tables.read_table(config.baseline, "per_query")["query_id"].to_pylist())
        if known_ids.isdisjoint(catalogue.ids[catalogue.query_items]):
            raise BadInput(
                f"--baseline {config.baseline} has no query in common with this catalogue; choose another baseline"
            )


def conclude(config: ScheduleConfig, *, seed: int = 0) -> Outcome:
    """Compare the finished evaluation with the baseline and the previous run, and record it once for each run id.

    A run is done when its row is in the history: a killed run compares again, a done one returns its outcome again.
    Writes `verdict.json` and `trend.svg` in the run's folder, the trend in its report, the row, and the history's page.
    Raises BadInput as `compare_runs` does against the baseline.
    """
    history = read_history(config.history)
    is_done = config.run_id in set(history["run_id"])
    if not is_done:
        _record(config, history, seed)
    if config.accept_baseline:
        accept(config.history, config.run_id)
    history = read_history(config.history)
    position = history["run_id"].tolist().index(config.run_id)
    row = history.iloc[position]
    metric = str(row["metric"])
    write_trend(config.folder, history.head(position + 1), metric)
    write_page(config.history.with_suffix(".html"), history, metric, config.runs)
    found = {name: row[f"change_from_{name}"] for name in ("baseline", "previous")}
    changes = {name: None if pd.isna(change) else float(change) for name, change in found.items()}
    outcome = Outcome(int(row["exit_code"]), str(row["verdict"]), str(row["reason"]), changes)
    state = "was done before" if is_done else "is done"
    logger.info("run %s %s: %s: %s", config.run_id, state, outcome.verdict, outcome.reason)
    return outcome


def _record(config: ScheduleConfig, history: pd.DataFrame, seed: int) -> None:
    """Compare, write verdict.json, append the row."""
    summaries: dict[str, Any] = {"baseline": None, "previous": None}
    reasons: list[str] = []
    previous, accepted = references(history, config.run_id)
    if accepted is not None:
        name = f"the accepted run {accepted}"
        summaries["baseline"] = _against(config, config.runs / accepted, name, reasons, seed)
    elif config.baseline is not None:
        summaries["baseline"] = _against(config, config.baseline, "the baseline", reasons, seed)
    if previous is not None and previous == accepted:
        previous = None  # it is the baseline already
    elif (obstacle := _obstacle(config, history, previous)) is None:
        name = f"the last run without a regression, {previous}"
        summaries["previous"] = _against(config, config.runs / str(previous), name, reasons, seed)
    else:
        reasons.append(obstacle)
    compared = {name: part["difference"][config.metric] for name, part in summaries.items() if part}
    is_worse = any(is_regression(difference, config.tolerance) for difference in compared.values())
    fingerprint = artifacts.read_manifest(config.folder)["fingerprint"]
    measured = json.loads((config.folder / "metrics.json").read_text(encoding="utf-8"))
    row = {
        "run_id": config.run_id,
        "verdict": "regression" if is_worse else "no regression" if compared else "not compared",
        "exit_code": EXIT_REGRESSION if is_worse else 0,
        "reason": "; ".join(reasons),
        "metric": config.metric,
        "tolerance": config.tolerance,
        "change_from_baseline": compared.get("baseline", {}).get("mean"),
        "change_from_previous": compared.get("previous", {}).get("mean"),
        "catalogue": fingerprint["catalogue"],
        "model": model_digest(fingerprint["model"]),
        "n_queries": measured["n_queries"],
    }
    write_json(config.folder / "verdict.json", row | {"against": summaries, "previous_run_id": previous})
    append(config.history, row, measured.get("reranked") or measured["first_stage"])


def model_digest(identity: Any) -> str | None:
    """A digest of the pairwise model's part of the fingerprint; None for the first stage alone."""
    return identity if identity is None or isinstance(identity, str) else artifacts.json_digest(identity)


def _against(config: ScheduleConfig, other: Path, name: str, reasons: list[str], seed: int) -> dict[str, Any] | None:
    """The comparison with another run, None where no query is common; adds a sentence about it to `reasons`."""
    try:
        comparison = compare_runs(other, config.folder, seed=seed, other_catalogue=True)
    except NothingInCommon as error:
        reasons.append(f"cannot compare with {name}: {error}")
        return None
    sentence = describe(comparison, config.metric, config.tolerance, name)
    change = catalogue_change(comparison.summary)
    reasons.append(f"{sentence} ({change})" if change else sentence)
    return comparison.summary


def _obstacle(config: ScheduleConfig, history: pd.DataFrame, previous: str | None) -> str | None:
    """Why the run `previous` cannot be compared with this one; None where it can."""
    if previous is None:
        return "there is no previous run" if history.empty else "no earlier run is without a regression"
    last = history[history["run_id"] == previous].iloc[-1]
    folder = config.runs / previous
    if not (folder / artifacts.MANIFEST).is_file():
        return f"cannot compare with the previous run {previous}: its folder {folder} is gone"
    if config.metric not in history or pd.isna(last[config.metric]):
        return f"cannot compare with the previous run {previous}: it has no {config.metric}"
    return None
