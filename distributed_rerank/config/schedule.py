"""Which scheduled run this is, and when a loss counts as a regression."""

import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from distributed_rerank.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The run, its history, and when a loss counts as a regression."""

    history: Path
    """Parquet file with one row for each run; made if absent. The page history.html is written beside it."""
    runs: Path
    """Folder of the runs; this one's evaluation is the folder runs/RUN_ID."""
    run_id: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    """Name of this run. Default: today's date (UTC)."""
    baseline: Path | None = None
    """Evaluation folder that every run is compared with, beside the last run without a regression."""
    accept_baseline: bool = False
    """Accept this run's result as it is: from now on runs are compared with it, in place of --baseline too. Until then
    a regression fails every night. Give it with the --run-id of a finished run, or with a new run."""
    webhook: str | None = field(default_factory=lambda: os.environ.get("DISTRIBUTED_RERANK_WEBHOOK"))
    """URL that gets a POST of JSON with a `text` when a run regressed or failed.
    Default: $DISTRIBUTED_RERANK_WEBHOOK."""
    metrics_file: Path | None = None
    """File ending in .prom that gets the last verdict and figures as Prometheus gauges, for a textfile collector."""
    metric: str = "map@10"
    """The metric that decides."""
    tolerance: float = 0.005
    """A loss is a regression where its 95 % interval lies below 0 and its mean below -tolerance."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*", self.run_id):
            raise BadInput(f"run_id={self.run_id!r} cannot name a folder; use letters, digits and _ . : + -")
        if not 0 <= self.tolerance < 1:
            raise BadInput(f"tolerance={self.tolerance} must be at least 0 and below 1; metrics are fractions")
        require_ending("history", self.history, ".parquet")
        if self.metrics_file is not None:
            require_ending("metrics_file", self.metrics_file, ".prom")  # collectors read no other

    @property
    def folder(self) -> Path:
        """Where this run's evaluation lies."""
        return self.runs / self.run_id


def require_ending(name: str, path: Path, ending: str) -> None:
    """Raises BadInput where a file's name would say something else than what is in it."""
    if path.suffix != ending:
        raise BadInput(f"{name}={str(path)!r} does not end in {ending}; give {path.with_suffix(ending)}")
