"""jobs/examples: each file by its parser or schema, each command line by the job's own parser."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from distributed_rerank import command_line
from distributed_rerank.errors import BadInput

EXAMPLES = Path(__file__).resolve().parents[2] / "jobs" / "examples"
FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
OF_UNIT = {
    "Unit": {"Description", "Documentation", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Timer": {"OnCalendar", "RandomizedDelaySec", "Persistent", "Unit"},
    "Install": {"WantedBy"},
    "Service": {
        "Type", "User", "WorkingDirectory", "ExecStart", "Restart", "RestartSec", "RestartPreventExitStatus",
        "TimeoutStartSec", "RuntimeMaxSec", "KillSignal", "TimeoutStopSec", "NoNewPrivileges", "PrivateTmp",
    },
}  # fmt: skip


def parsed(command: list[str]) -> Any:
    """The arguments of `... python [folder/]jobs/NAME.py ...` as that job reads them."""
    script = next(position for position, word in enumerate(command) if re.search(r"(^|/)jobs/\w+\.py$", word))
    assert Path(command[script - 1]).name == "python"
    return command_line.parse(Path(command[script]).stem.replace("_", "-"), command[script + 1 :])


def crontab_entries() -> tuple[dict[str, str], list[tuple[list[str], str]]]:
    """Settings, and each entry's five time fields and its command as the shell gets it."""
    settings, entries = {}, []
    for line in (EXAMPLES / "crontab").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        setting = re.fullmatch(r"(\w+)=(.*)", line)
        if setting:
            settings[setting[1]] = setting[2]
            continue
        *fields, command = line.split(maxsplit=5)
        assert not re.search(r"(?<!\\)%", command), "cron turns a plain per cent sign into a line break"
        entries.append((fields, command.replace(r"\%", "%")))
    return settings, entries


def check_field(text: str, low: int, high: int) -> None:
    for part in text.split(","):
        found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", part)
        assert found, f"{part!r} is no cron field"
        numbers = [int(number) for number in found.groups()[:2] if number is not None]
        assert all(low <= number <= high for number in numbers), f"{part!r} is not within {low}-{high}"
        assert numbers == sorted(numbers)


def test_crontab_fields_are_valid_and_the_command_is_read_by_both_jobs() -> None:
    settings, entries = crontab_entries()
    assert settings["RAY_AUTH_MODE"] == "token"
    assert len(entries) == 1
    fields, command = entries[0]
    for text, (_, low, high) in zip(fields, FIELDS, strict=True):
        check_field(text, low, high)
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    _, _, submission = command.partition(" && ")
    arguments = parsed(shlex.split(submission.replace("$(date -u +%F)", "2026-11-23")))
    assert arguments.submission_id == "evaluation-2026-11-23"
    inner = parsed(list(arguments.command))
    assert (inner.schedule.metric, inner.schedule.tolerance) == ("map@10", 0.005)


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(
        strict=True, delimiters=("=",), comment_prefixes=("#", ";"), interpolation=None, empty_lines_in_values=False
    )
    parser.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    parser.read_string((EXAMPLES / name).read_text())
    return parser


@pytest.mark.parametrize("name", ["rerank-evaluation.service", "rerank-evaluation.timer"])
def test_systemd_unit_has_known_sections_and_keys_only(name: str) -> None:
    parser = unit(name)
    for section in parser.sections():
        assert set(parser[section]) <= OF_UNIT[section], section
    assert Path(parser["Service"]["ExecStart"].split()[0]).is_absolute() if "Service" in parser else True


def test_systemd_timer_starts_the_service_whose_command_the_job_reads() -> None:
    timer, service = unit("rerank-evaluation.timer"), unit("rerank-evaluation.service")
    assert (EXAMPLES / timer["Timer"]["Unit"]).is_file()
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d UTC", timer["Timer"]["OnCalendar"])
    arguments = parsed(shlex.split(service["Service"]["ExecStart"]))
    assert arguments.schedule.history == Path("/srv/nightly/history.parquet")
    assert service["Service"]["RestartPreventExitStatus"].split() == ["2", "3"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_analyze_accepts_the_units(tmp_path: Path) -> None:
    for name in ("rerank-evaluation.service", "rerank-evaluation.timer"):
        # The example's interpreter is not on this machine; everything else is verified as it stands.
        text = (EXAMPLES / name).read_text().replace("/srv/distributed_rerank/.venv/bin/python", "/bin/true")
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in ("rerank-evaluation.service", "rerank-evaluation.timer")]
    result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    said = [line for line in result.stderr.splitlines() if "rerank-evaluation" in line]
    assert said == [], result.stderr
    (tmp_path / "rerank-evaluation.timer").write_text("[Timer]\nOnCalendar=every full moon\n")
    result = subprocess.run(["systemd-analyze", "verify", units[1]], capture_output=True, text=True, check=False)
    assert "Failed to parse calendar" in result.stderr, "the check finds a wrong line"


def mapping(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """Schema of a mapping with these fields and no other."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def sequence(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi)?$"}
META = mapping({"name": NAME}, {"namespace": NAME})
AMOUNTS = mapping({"cpu": QUANTITY, "memory": QUANTITY})
MOUNT = mapping({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}})
VOLUME = mapping(
    {"name": NAME},
    {"persistentVolumeClaim": mapping({"claimName": NAME}), "configMap": mapping({"name": NAME})},
)
CONTAINER = mapping(
    {"name": NAME, "image": TEXT},
    {
        "envFrom": sequence(mapping({"secretRef": mapping({"name": NAME})})),
        "command": sequence(TEXT),
        "args": sequence(TEXT),
        "resources": mapping({"requests": AMOUNTS, "limits": AMOUNTS}),
        "volumeMounts": sequence(MOUNT),
    },
)
POD = mapping(
    {"containers": sequence(CONTAINER)},
    {"volumes": sequence(VOLUME), "restartPolicy": {"enum": ["Never", "OnFailure"]}, "serviceAccountName": NAME},
)
TEMPLATE = mapping({"spec": POD})
START = {"type": "object", "additionalProperties": TEXT}
WORKERS = {"groupName": NAME, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT}
CLUSTER = mapping(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "headGroupSpec": mapping({"rayStartParams": START, "template": TEMPLATE}),
        "workerGroupSpecs": sequence(mapping({**WORKERS, "rayStartParams": START, "template": TEMPLATE})),
        "authOptions": mapping({"mode": {"enum": ["token"]}}),
    }
)
RAY_JOB = mapping(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": META,
        "spec": mapping(
            {"entrypoint": TEXT, "rayClusterSpec": CLUSTER, "shutdownAfterJobFinishes": {"const": True}},
            {
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "ttlSecondsAfterFinished": COUNT,
                "activeDeadlineSeconds": COUNT,
                "backoffLimit": COUNT,
            },
        ),
    }
)
CRON_JOB = mapping(
    {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "CronJob"},
        "metadata": META,
        "spec": mapping(
            {
                "schedule": TEXT,
                "concurrencyPolicy": {"const": "Forbid"},
                "jobTemplate": mapping({"spec": mapping({"template": TEMPLATE}, {"backoffLimit": COUNT})}),
            },
            {
                "timeZone": TEXT,
                "startingDeadlineSeconds": COUNT,
                "successfulJobsHistoryLimit": COUNT,
                "failedJobsHistoryLimit": COUNT,
            },
        ),
    }
)


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """The documents of the manifest by kind, and the RayJob of 2026-11-23 that its CronJob makes."""
    found = {part["kind"]: part for part in yaml.safe_load_all((EXAMPLES / "rayjob_cronjob.yaml").read_text())}
    job = found["ConfigMap"]["data"]["rayjob.yaml"].replace("RUN_DATE", "2026-11-23")
    return found | {"RayJob": yaml.safe_load(job)}


def test_ray_job_manifest_fits_the_schema_and_its_entrypoint_the_job(manifests: dict[str, Any]) -> None:
    jsonschema.validate(manifests["RayJob"], RAY_JOB)
    spec = manifests["RayJob"]["spec"]
    arguments = parsed(shlex.split(spec["entrypoint"]))
    assert arguments.schedule.run_id == "2026-11-23"
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert arguments.cluster.num_workers == workers["replicas"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_ray_job_manifest_names_the_ray_that_is_pinned(manifests: dict[str, Any]) -> None:
    pinned = (EXAMPLES.parents[1] / "constraints.txt").read_text()
    assert f"ray=={manifests['RayJob']['spec']['rayClusterSpec']['rayVersion']}\n" in pinned


def test_cron_job_manifest_fits_the_schema_and_mounts_what_it_creates(manifests: dict[str, Any]) -> None:
    jsonschema.validate(manifests["CronJob"], CRON_JOB)
    spec = manifests["CronJob"]["spec"]
    for text, (_, low, high) in zip(spec["schedule"].split(), FIELDS, strict=True):
        check_field(text, low, high)
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    assert pod["serviceAccountName"] == manifests["RoleBinding"]["subjects"][0]["name"]
    assert set(manifests["Role"]["rules"][0]["verbs"]) == {"create", "delete", "get", "list", "watch"}
    assert subprocess.run(["sh", "-n", "-c", pod["containers"][0]["args"][0]], check=False).returncode == 0


@pytest.mark.parametrize(
    ("states", "code", "calls"),
    [
        (["", "", "Running", "Complete"], 0, ["create"]),
        (["Failed", "", "Retrying", "Failed"], 1, ["delete", "create"]),
        (["Complete", "Complete", "Complete"], 0, []),
        (["Running", "Running", "Complete"], 0, []),
    ],
)
def test_cron_job_waits_for_its_run_and_makes_a_failed_one_again(
    manifests: dict[str, Any], tmp_path: Path, states: list[str], code: int, calls: list[str]
) -> None:
    """The script as it stands, with a `kubectl` that answers one state after the other and notes what it changes."""
    script = manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    (tmp_path / "rayjob.yaml").write_text("run: RUN_DATE\n")
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "calls").touch()
    (tmp_path / "kubectl").write_text(
        f"""#!/bin/sh
cd {tmp_path}
case "$*" in
  get*jsonpath*) head -n 1 states | tr -d '\\n'; sed -i 1d states ;;
  get*) [ -n "$(head -n 1 states)" ] ; found=$?; sed -i 1d states; exit $found ;;
  *) echo "$1" >> calls ;;
esac
"""
    )
    (tmp_path / "kubectl").chmod(0o755)
    script = script.replace("/manifest/", f"{tmp_path}/").replace("/tmp/rayjob.yaml", f"{tmp_path}/made.yaml")
    done = subprocess.run(
        ["sh", "-ec", script],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOOK_SECONDS": "0"},
        timeout=20,
        check=False,
    )
    assert done.returncode == code
    assert (tmp_path / "calls").read_text().split() == calls
    assert re.fullmatch(r"run: \d{4}-\d\d-\d\d\n", (tmp_path / "made.yaml").read_text())


@pytest.mark.parametrize("change", [{"backOffLimit": 1}, {"submissionMode": "CronMode"}, {"entrypoint": 3}])
def test_ray_job_schema_refuses_a_wrong_field(manifests: dict[str, Any], change: dict[str, Any]) -> None:
    wrong = {**manifests["RayJob"], "spec": {**manifests["RayJob"]["spec"], **change}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAY_JOB)


def test_parsed_refuses_a_flag_that_the_job_does_not_have() -> None:
    with pytest.raises(BadInput, match="--tolerence"):
        parsed(shlex.split("python jobs/scheduled_evaluation.py --catalogue c --history h --runs r --tolerence 1"))
