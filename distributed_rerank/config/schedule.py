"""Which scheduled run this is, and when a loss counts as a regression."""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from distributed_rerank.config.work import refuse_uri
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
    """Evaluation folder that every run is compared with, beside the previous run."""
    metric: str = "map@10"
    """The metric that decides."""
    tolerance: float = 0.005
    """A loss is a regression where its 95 % interval lies below 0 and its mean below -tolerance."""

    def __post_init__(self) -> None:
        refuse_uri("--history", self.history)
        refuse_uri("--runs", self.runs)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*", self.run_id):
            raise BadInput(f"run_id={self.run_id!r} cannot name a folder; use letters, digits and _ . : + -")
        if not 0 <= self.tolerance < 1:
            raise BadInput(f"tolerance={self.tolerance} must be at least 0 and below 1; metrics are fractions")

    @property
    def folder(self) -> Path:
        """Where this run's evaluation lies."""
        return self.runs / self.run_id
