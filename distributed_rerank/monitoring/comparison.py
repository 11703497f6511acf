"""Compares two evaluations of one catalogue query by query.

Compared are the final rankings of both: the re-ranked one, or the first stage's where nothing was re-ranked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from distributed_rerank.data import tables
from distributed_rerank.errors import BadInput
from distributed_rerank.report.formatting import count_of, fraction, in_table_order, interval, metric_name, signed
from distributed_rerank.storage import artifacts
from distributed_rerank.tensors import statistics
from distributed_rerank.tensors.metrics import means

NO_CATEGORY = "(none)"


class NothingInCommon(BadInput):
    """Two runs that measured no query in common."""


@dataclass(frozen=True)
class Comparison:
    """`summary` is plain JSON; `changes` has label, category and the metrics' differences of every shared query."""

    summary: dict[str, Any]
    changes: pd.DataFrame


def compare_runs(
    baseline: Path, run: Path, *, seed: int = 0, n_resamples: int = 2000, other_catalogue: bool = False
) -> Comparison:
    """How the final ranking of the evaluation folder `run` differs from that of `baseline`, paired by query.

    Differences are run - baseline of the metrics that both have, over the queries that both measured and within each
    category; intervals and p-values are clustered by label (`statistics.compare`). Queries that only one side measured
    are left out and counted. Raises BadInput for folders that are no evaluations and, naming both digests, for runs of
    different catalogues. With `other_catalogue` these are compared as well, over the queries that have one id and one
    label in both; the gallery may have changed under them.
    """
    prints = [fingerprint_of(folder) for folder in (baseline, run)]
    if not other_catalogue:
        require_same_catalogue(str(baseline), prints[0]["catalogue"], str(run), prints[1]["catalogue"])
    sides = [final_values(folder) for folder in (baseline, run)]
    both = sides[0].index.intersection(sides[1].index).sort_values()
    is_same_label = (sides[0].loc[both, "label"].astype(str) == sides[1].loc[both, "label"].astype(str)).to_numpy()
    shared = both[is_same_label]
    metrics = [key for key in sides[0] if key in sides[1] and key not in ("label", "category")]
    if shared.empty:
        raise NothingInCommon(f"{baseline} and {run} measured no query in common; compare runs of the same split")
    before, after = (side.loc[shared] for side in sides)
    labels = torch.from_numpy(np.unique(before["label"].astype(str), return_inverse=True)[1].astype(np.int64))
    categories = before["category"].fillna(NO_CATEGORY).astype(str).reset_index(drop=True)
    groups = {} if before["category"].isna().all() else categories.groupby(categories).indices

    def within(rows: np.ndarray) -> dict[str, Any]:
        baseline, run = (
            {key: torch.from_numpy(side[key].to_numpy()[rows]) for key in metrics} for side in (before, after)
        )
        return {
            "n_queries": len(rows),
            "baseline": means(baseline),
            "run": means(run),
            "difference": statistics.compare_to_json(baseline, run, labels[rows], seed=seed, n_resamples=n_resamples),
        }

    summary = {
        "catalogue": prints[1]["catalogue"],
        "catalogue_of_baseline": prints[0]["catalogue"],
        "n_relabelled": len(both) - len(shared),
        "models": {"baseline": prints[0].get("model"), "run": prints[1].get("model")},
        "n_only_in_baseline": len(sides[0]) - len(both),
        "n_only_in_run": len(sides[1]) - len(both),
        **within(np.arange(len(shared))),
        "categories": {name: within(rows) for name, rows in groups.items()},
    }
    return Comparison(summary, before[["label", "category"]].join(after[metrics] - before[metrics]))


def catalogue_change(summary: Mapping[str, Any]) -> str:
    """What is to be known of a comparison of two catalogues, in words; "" where they are the same."""
    old, new = summary["catalogue_of_baseline"][:16], summary["catalogue"][:16]
    if old == new:
        return ""
    counts = [
        f"{count_of(summary[key])} {what}"
        for key, what in (
            ("n_only_in_run", "new"),
            ("n_only_in_baseline", "gone"),
            ("n_relabelled", "with another label"),
        )
        if summary[key]
    ]
    others = f", queries left out: {', '.join(counts)}" if counts else ""
    return f"the catalogue changed from {old} to {new}: {count_of(summary['n_queries'])} common queries{others}"


def catalogue_of(folder: Path) -> str:
    """Digest of the catalogue that was evaluated into `folder`. Raises BadInput for a folder that is no evaluation."""
    return fingerprint_of(folder)["catalogue"]


def require_same_catalogue(baseline: str, baseline_digest: str, run: str, run_digest: str) -> None:
    """Raises BadInput naming both digests where they differ."""
    if baseline_digest != run_digest:
        raise BadInput(
            f"{baseline} was evaluated on catalogue {baseline_digest[:16]}, {run} on {run_digest[:16]}: their queries "
            "cannot be paired; evaluate both on one catalogue, or choose a baseline of this one"
        )


def comparison_in_text(summary: Mapping[str, Any]) -> str:
    """The comparison as a table of metrics, then mAP@10 of every category, worst first."""
    left_out = summary["n_only_in_baseline"] + summary["n_only_in_run"]
    note = f", {count_of(left_out)} measured by one side only" if left_out else ""
    lines = [f"{count_of(summary['n_queries'])} queries of catalogue {summary['catalogue'][:16]}{note}", ""]
    lines.append(f"{'':14}{'baseline':>9}{'run':>9}{'change':>10}   95 % interval")
    lines += [_line(metric_name(key), summary, key) for key in in_table_order(summary["difference"])]
    categories = summary["categories"]
    if categories:
        lines += ["", "mAP@10 by category, worst first"]
        worst_first = sorted(categories, key=lambda name: (categories[name]["difference"]["map@10"]["mean"], name))
        lines += [_line(name, categories[name], "map@10") for name in worst_first]
    return "\n".join(lines)


def _line(name: str, part: Mapping[str, Any], key: str) -> str:
    compared = part["difference"][key]
    values = f"{fraction(part['baseline'][key]):>9}{fraction(part['run'][key]):>9}{signed(compared['mean']):>10}"
    return f"{name:14}{values}   {interval(compared)}"


def fingerprint_of(folder: Path) -> dict[str, Any]:
    """What the evaluation `folder` was made from. Raises BadInput for a folder that is no evaluation."""
    fingerprint = artifacts.read_manifest(folder)["fingerprint"]
    if fingerprint.get("stage") != "evaluate":
        stage = fingerprint.get("stage")
        raise BadInput(f"{folder} is an output of {stage!r}; give a folder that `evaluate` wrote")
    return fingerprint


def final_values(folder: Path) -> pd.DataFrame:
    """label, category and every metric of the final ranking, by query id."""
    table = tables.read_table(folder, "per_query").to_pandas().set_index("query_id")
    side = "_after" if "map@10_after" in table else "_before"
    names = [name for name in table if str(name).endswith(side) and not str(name).startswith("first_hit")]
    values = table[names].rename(columns=lambda name: str(name).removesuffix(side))
    return table[["label", "category"]].join(values)
