"""Tells other programs how a night went: Prometheus gauges in a file, and a message to a web hook.

The file is for a textfile collector of node_exporter; deploy/alerts.yaml has rules for its
gauges, deploy/grafana.json a dashboard. Neither the file nor the hook can change how the run ends.
"""

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.storage.files import write_bytes

logger = logging.getLogger(__name__)

GAUGES = {
    "rerank_run_exit_code": "How the last run ended: 0 good, 2 bad input, 3 regression, 75 outage, 1 another failure.",
    "rerank_run_end_timestamp_seconds": "When the last run ended.",
    "rerank_run_duration_seconds": "How long the last run took.",
    "rerank_run_metric": "A metric of the final ranking of the last run that was measured, 0 to 1.",
    "rerank_run_change": "Its change against the baseline or the previous run.",
    "rerank_run_queries": "Queries that it measured.",
    "rerank_run_rejected_images": "Images that it could not read.",
}
_TIMEOUT_S = 10.0


@contextmanager
def told(config: ScheduleConfig, figures: dict[str, Any]) -> Iterator[None]:
    """A run inside the block is told of when it ends, however it ends.

    `figures` has at the end what is known: exit_code, reason, metrics, changes, n_queries, n_rejected.
    """
    began = time.time()
    try:
        yield
    except BaseException as error:
        codes = {BadInput: 2, Outage: 75, KeyboardInterrupt: 130}
        figures["exit_code"] = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
        figures["reason"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        figures["seconds"], figures["ended"] = time.time() - began, time.time()
        _tell(config, figures)


def _tell(config: ScheduleConfig, figures: Mapping[str, Any]) -> None:
    code, reason = figures["exit_code"], figures.get("reason", "")
    if config.metrics_file is not None:
        try:
            config.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            earlier = config.metrics_file.read_text(encoding="utf-8") if config.metrics_file.is_file() else ""
            write_bytes(config.metrics_file, gauges_text(figures, earlier).encode())
        except OSError as error:
            logger.warning("--metrics-file %s is not written: %s", config.metrics_file, error)
    if config.webhook and code not in (0, 130):
        what = "found a regression" if code == 3 else f"failed (exit code {code})"
        _post(config.webhook, {"text": f"evaluation {config.run_id} {what}: {reason}", "exit_code": code})


def gauges_text(figures: Mapping[str, Any], earlier: str = "") -> str:
    """The text of the gauges; those that a failed run did not measure stay as they were in `earlier`."""
    lines: dict[str, list[str]] = {
        "rerank_run_exit_code": [f"rerank_run_exit_code {figures['exit_code']}"],
        "rerank_run_end_timestamp_seconds": [f"rerank_run_end_timestamp_seconds {figures['ended']:.0f}"],
        "rerank_run_duration_seconds": [f"rerank_run_duration_seconds {figures['seconds']:.1f}"],
    }
    if "metrics" in figures:
        values = figures["metrics"].items()
        lines["rerank_run_metric"] = [f'rerank_run_metric{{metric="{name}"}} {value:.6f}' for name, value in values]
        changes = [(name, value) for name, value in figures["changes"].items() if value is not None]
        lines["rerank_run_change"] = [f'rerank_run_change{{against="{name}"}} {value:.6f}' for name, value in changes]
        lines["rerank_run_queries"] = [f"rerank_run_queries {figures['n_queries']}"]
        lines["rerank_run_rejected_images"] = [f"rerank_run_rejected_images {figures['n_rejected']}"]
    for line in earlier.splitlines():
        name = line.partition(" ")[0].partition("{")[0]
        if name in GAUGES and ("metrics" not in figures) and name not in list(lines)[:3]:
            lines.setdefault(name, []).append(line)
    text = ""
    for name, samples in lines.items():
        text += "".join(f"{line}\n" for line in (f"# HELP {name} {GAUGES[name]}", f"# TYPE {name} gauge", *samples))
    return text


def _post(url: str, message: Mapping[str, Any]) -> None:
    body = json.dumps(message).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("no http or https URL")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            pass
    except (urllib.error.URLError, OSError, ValueError) as error:
        logger.warning("--webhook was not told: %s", error)  # the URL may hold a secret
