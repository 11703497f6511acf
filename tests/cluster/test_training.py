"""Training on Ray: the losses of one process for any number of workers, and the same weights after any
kill."""

import fcntl
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_examples import build_task

from distributed_rerank.cluster import training
from distributed_rerank.cluster.session import Session
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import begun
from distributed_rerank.training import run as training_run
from distributed_rerank.training.state import load_latest, saved_epochs
from distributed_rerank.training.task import TrainingTask

pytestmark = pytest.mark.ray

DRIVER = """
import functools, sys
from pathlib import Path
from training_examples import build_task
from distributed_rerank.cluster import training
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.cluster.session import connect

folder = Path(sys.argv[1])
task = build_task(folder / "task", epochs=25)
with connect(ClusterConfig(num_workers=1)) as session:
    training.fit(task, folder / "run", session=session)
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    return build_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def alone(task: TrainingTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return training_run.fit(task, tmp_path_factory.mktemp("alone"))


def test_folder_that_only_the_driver_sees_is_refused_before_training(ray_cluster: str, tmp_path: Path) -> None:
    training.require_shared(tmp_path / "shared")
    assert list((tmp_path / "shared").iterdir()) == []
    own = os.open(tmp_path, os.O_RDONLY)
    number = fcntl.fcntl(own, fcntl.F_DUPFD, 900)
    try:  # a folder's path that means something in this process alone
        with pytest.raises(BadInput, match=r"fd/9\d\d is not seen by node .*; give one as --out"):
            training.require_shared(Path(f"/proc/self/fd/{number}"))
    finally:
        os.close(number)
        os.close(own)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def losses_of(state: dict[str, Any]) -> list[float]:
    return [entry["loss"] for result in training_run.results(state) for entry in result["history"]]


def assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["current"]["model"].keys() == other["current"]["model"].keys()
    for name, value in one["current"]["model"].items():
        assert torch.equal(value, other["current"]["model"][name]), name


def test_one_worker_gives_the_bits_of_one_process(
    task: TrainingTask, alone: dict[str, Any], session_of: Callable[[int], Session], tmp_path: Path
) -> None:
    state = training.fit(task, tmp_path, session=session_of(1))
    assert losses_of(state) == losses_of(alone)
    assert_same_weights(state, alone)


def test_two_workers_give_the_losses_of_one(
    task: TrainingTask, alone: dict[str, Any], session_of: Callable[[int], Session], tmp_path: Path
) -> None:
    state = training.fit(task, tmp_path, session=session_of(2))
    assert len(losses_of(state)) == 9
    assert begun.recall(tmp_path) == {"device": "cpu", "precision": "float32"}
    assert losses_of(state) == pytest.approx(losses_of(alone), abs=1e-5)


@pytest.mark.slow
def test_four_workers_give_the_losses_of_one_for_twenty_steps(
    session_of: Callable[[int], Session], tmp_path: Path
) -> None:
    task = build_task(tmp_path / "task", epochs=7)
    expected = losses_of(training_run.fit(task, tmp_path / "alone"))
    state = training.fit(task, tmp_path / "run", session=session_of(4))
    assert len(expected) >= 20
    assert losses_of(state) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_bad_input_of_the_workers_comes_back_as_itself(
    task: TrainingTask, session_of: Callable[[int], Session], tmp_path: Path
) -> None:
    broken = replace(task, config=replace(task.config, lr=1e30, clip_norm=0.0, warmup_steps=0))
    with pytest.raises(BadInput, match="lower lr"):
        training.fit(broken, tmp_path, session=session_of(1))


@pytest.mark.slow
def test_killed_worker_is_replaced_and_the_weights_are_the_same(
    tmp_path: Path, session_of: Callable[[int], Session]
) -> None:
    task = build_task(tmp_path / "task", epochs=6)
    expected = training_run.fit(task, tmp_path / "alone")
    found: list[dict[str, Any]] = []
    fit = functools.partial(training.fit, task, tmp_path / "run", session=session_of(1))
    thread = threading.Thread(target=lambda: found.append(fit()))
    thread.start()
    wait_for_checkpoints(tmp_path / "run", 3)
    killed = [pid for pid in pids() if "RayTrainWorker" in command_of(pid)]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    thread.join(timeout=240)
    assert killed, "the worker was gone before it could be killed"
    assert_same_weights(found[0], expected)


@pytest.mark.slow
def test_killed_driver_and_the_same_command_again_give_the_same_weights(tmp_path: Path, ray_cluster: str) -> None:
    """Beside another Ray on the machine. A healthy training logs nothing of Ray's, and each line with its time."""
    expected = training_run.fit(build_task(tmp_path / "expected", epochs=25), tmp_path / "alone")
    command, environment = driver_of(tmp_path)
    driver = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_for_checkpoints(tmp_path / "run", 3)
    driver.kill()
    driver.wait()
    n_before = saved_epochs(tmp_path / "run" / training.CHECKPOINTS)[-1]
    assert n_before >= 3
    done = subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert any("epoch 25" in line for line in lines)
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d INFO ", line)] == []
    state = load_latest(tmp_path / "run" / training.CHECKPOINTS)
    assert state is not None
    assert_same_weights(state, expected)


@pytest.mark.slow
def test_ctrl_c_interrupts_a_training(tmp_path: Path) -> None:
    """Ray Train's own handler would end the process with exit code 1."""
    command, environment = driver_of(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    wait_for_checkpoints(tmp_path / "run", 2)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=120)[1]
    assert driver.returncode != 0
    assert "KeyboardInterrupt" in said, said


def driver_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command that trains in `folder` with a Ray of its own, and its environment."""
    tests = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return [sys.executable, "-c", DRIVER, str(folder)], environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def wait_for_checkpoints(folder: Path, number: int) -> None:
    """Returns when so many epochs are kept."""
    deadline = time.monotonic() + 240
    while not (epochs := saved_epochs(folder / training.CHECKPOINTS)) or epochs[-1] < number:
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


def pids() -> list[int]:
    """Processes that descend from this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, level = [], [os.getpid()]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
