"""What other programs are told of a run: gauges that Prometheus reads, rules and a dashboard, a web hook."""

import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.monitoring.alerts import GAUGES, gauges_text, told

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MEASURED = {
    "exit_code": 3, "reason": "mAP@10 fell", "metrics": {"map@10": 0.5, "cmc@1": 0.25},
    "n_queries": 10, "n_rejected": 1, "changes": {"baseline": -0.125, "previous": None},
}  # fmt: skip


def samples(text: str) -> dict[tuple[str, ...], float]:
    families = list(text_string_to_metric_families(text))
    assert all(family.type == "gauge" and family.documentation for family in families)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def config(folder: Path, **other: Any) -> ScheduleConfig:
    return ScheduleConfig(history=folder / "h.parquet", runs=folder, run_id="1", **other)


def test_gauges_of_a_measured_run_are_read_by_prometheus() -> None:
    found = samples(gauges_text({**MEASURED, "seconds": 12.5, "ended": 100.0}))
    assert found == {
        ("rerank_run_exit_code",): 3, ("rerank_run_end_timestamp_seconds",): 100,
        ("rerank_run_duration_seconds",): 12.5, ("rerank_run_metric", "map@10"): 0.5,
        ("rerank_run_metric", "cmc@1"): 0.25, ("rerank_run_change", "baseline"): -0.125,
        ("rerank_run_queries",): 10, ("rerank_run_rejected_images",): 1,
    }  # fmt: skip
    assert {name for name, *_ in found} == set(GAUGES)


@pytest.mark.parametrize(
    ("error", "code"), [(BadInput("x"), 2), (Outage("x"), 75), (KeyboardInterrupt(), 130), (AssertionError("x"), 1)]
)
def test_failed_run_is_told_with_its_code_and_keeps_the_figures_of_the_last(
    tmp_path: Path, error: BaseException, code: int
) -> None:
    given = config(tmp_path, metrics_file=tmp_path / "collector" / "rerank.prom", webhook="ftp://nowhere")
    with told(given, dict(MEASURED)):
        pass
    with pytest.raises(type(error)), told(given, {"exit_code": 1}):
        raise error
    found = samples((tmp_path / "collector" / "rerank.prom").read_text())
    assert found["rerank_run_exit_code",] == code
    assert found["rerank_run_metric", "map@10"] == 0.5


def test_web_hook_gets_one_message_for_a_regression_and_none_for_a_good_run(tmp_path: Path) -> None:
    got: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = config(tmp_path, webhook=f"http://127.0.0.1:{server.server_port}/secret")
    for code in (0, 3):
        with told(given, {**MEASURED, "exit_code": code}):
            pass
    server.shutdown()
    server.server_close()
    assert got == [{"text": "evaluation 1 found a regression: mAP@10 fell", "exit_code": 3}]
    with told(given, dict(MEASURED)):
        pass  # a hook that does not answer changes nothing


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    return [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]


def test_rules_and_dashboard_name_gauges_that_there_are() -> None:
    named = {name for expression in expressions() for name in re.findall(r"rerank_\w+", expression)}
    assert named == set(GAUGES)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_loads_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(DEPLOY / "alerts.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "4 rules found" in done.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metrics_file": Path("gauges.txt")}, r"metrics_file='gauges.txt' does not end in .prom; give gauges.prom"),
        ({"history": Path("nightly/history.csv")}, r"does not end in .parquet; give nightly/history.parquet"),
        ({"history": Path("nightly")}, r"history='nightly' does not end in .parquet; give nightly.parquet"),
    ],
)
def test_file_of_another_ending_than_its_content_is_refused(changed: dict[str, Any], message: str) -> None:
    """A collector reads *.prom alone, and nobody would notice that it leaves another file out."""
    with pytest.raises(BadInput, match=message):
        ScheduleConfig(**{"history": Path("h.parquet"), "runs": Path("runs"), **changed})
