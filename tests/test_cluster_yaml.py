"""cluster.yaml is accepted by Ray's own validation, and is closed to the network."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

TEXT = (Path(__file__).resolve().parents[1] / "cluster.yaml").read_text(encoding="utf-8")


def prepared(change: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    config = yaml.safe_load(TEXT)
    if change is not None:
        change(config)
    return prepare_config(config)


def test_cluster_yaml_passes_the_validation_of_ray_up() -> None:
    validate_config(prepared())


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


def test_cluster_yaml_keeps_the_dashboard_on_the_loopback_address() -> None:
    start = " ".join(prepared()["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start


def test_cluster_yaml_every_ray_start_demands_a_token_which_is_mounted() -> None:
    config = prepared()
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert any(remote.endswith(".ray/auth_token") for remote in config["file_mounts"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_cluster_yaml_images_carry_the_installed_version_of_ray() -> None:
    config = yaml.safe_load(TEXT)
    dockers = [
        config["docker"],
        *(kind.get("docker", {}) for kind in config["available_node_types"].values()),
    ]
    images = [value for docker in dockers for key, value in docker.items() if key.endswith("image")]
    assert len(images) == 3
    assert all(image.startswith(f"rayproject/ray:{version('ray')}-py311-") for image in images)
