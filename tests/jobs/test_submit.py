"""jobs/submit.py: a truthful exit code for every end of a job, on a real Ray with a token."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from job_files import EXTRACTOR, bytes_of, wait_until
from ray.job_submission import JobDetails, JobStatus, JobType
from ray_head import Head, ask, started_head

from distributed_rerank import command_line
from distributed_rerank.cluster.submit import exit_code, main
from distributed_rerank.config.jobs import SubmitJob
from distributed_rerank.errors import BadInput


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, 0, 1),
        (JobStatus.FAILED, -9, 1),
        (JobStatus.FAILED, 256, 1),
        (JobStatus.STOPPED, 0, 130),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_exit_code_tells_how_the_job_ended(status: JobStatus, driver: int | None, expected: int) -> None:
    job = JobDetails(type=JobType.SUBMISSION, entrypoint="true", status=status, driver_exit_code=driver)
    assert exit_code(job) == expected


def test_arguments_after_the_dashes_stay_as_they_are() -> None:
    command = ["python", "jobs/evaluate.py", "--address", "x", "--ks", "1", "5"]
    given = command_line.parse("submit", ["--submission-id", "a", "--", *command])
    assert list(given.command) == command
    assert given.address == "http://127.0.0.1:8265"


def test_submission_without_a_command_is_refused() -> None:
    with pytest.raises(BadInput, match="no command to submit; give it after --"):
        main(SubmitJob(command=(), submission_id="a"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as running:
        yield running


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(560)
def test_submit_ends_as_the_job_does_and_attaches_to_a_known_id(
    head: Head, start_job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "say.py").write_text("import sys\nprint('said', sys.argv[1])\nsys.exit(int(sys.argv[2]))\n")

    def submit(
        submission_id: str, command: str, address: str = head.address, env: str = "X=1"
    ) -> subprocess.Popen[str]:
        given = ["--address", address, "--submission-id", submission_id, "--working-dir", tmp_path / "code"]
        given += ["--env", env, "--driver-cpus", 1]
        return start_job("submit", *given, "--", *shlex.split(command), **head.environment)

    flaky = "bash -c 'test -e $MARK && exit 0; touch $MARK; exit 75'"
    crash = submit("crash", flaky, env=f"MARK={tmp_path}/mark")
    good, bad = submit("good", "python say.py 'two words' 0"), submit("bad", "python say.py no 3")
    stopped = submit("stopped", "python -c 'import time; print(1, flush=True); time.sleep(500)'")
    wait_until_running(head, "stopped")
    ask(head.address, head.environment, "/api/jobs/stopped/stop", "POST")
    outputs = [process.communicate(timeout=300) for process in (good, bad, stopped)]
    assert [process.returncode for process in (good, bad, stopped)] == [0, 3, 130], outputs
    assert "said two words" in outputs[0][0]

    said = crash.communicate(timeout=300)
    assert crash.returncode == 75, said
    for _ in range(2):  # the third start attaches to the second, which has succeeded
        crash = submit("crash", flaky, env=f"MARK={tmp_path}/mark")
        said = crash.communicate(timeout=300)
        assert crash.returncode == 0, said
    assert "crash.2 is known to the cluster (SUCCEEDED): attached" in said[1]
    again, other = submit("bad", "python say.py no 3"), submit("bad", "python say.py yes 0")
    absent = submit("x", "true", "http://127.0.0.1:9")
    outputs = [process.communicate(timeout=300) for process in (again, other, absent)]
    assert [process.returncode for process in (again, other, absent)] == [3, 2, 75], outputs
    assert "said no" in outputs[0][0]
    assert "attached" in outputs[0][1]
    assert "error: --submission-id bad runs 'python say.py no 3'; give another id" in outputs[1][1]
    assert "outage: --address http://127.0.0.1:9 does not answer" in outputs[2][1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(560)
def test_night_killed_on_the_cluster_goes_on_by_the_same_trigger(
    head: Head,
    catalogue_path: Path,
    models: dict[str, Path],
    run_job: Callable,
    start_job: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    def night(folder: Path) -> list[object]:
        places = ["--history", folder / "history.parquet", "--runs", folder / "runs", "--run-id", "1"]
        small = [*EXTRACTOR, "--model", models["concat"], "--queries-per-block", "1", "--pairs-per-batch", "1"]
        return ["--catalogue", catalogue_path, *places, *small, "--chain", "replace", "--top-n", "30"]

    def trigger() -> subprocess.Popen[str]:
        job = [sys.executable, "-m", "distributed_rerank", "scheduled-evaluation", *night(killed), "--num-workers", "1"]
        given = ["--address", head.address, "--submission-id", "night", "--driver-cpus", 1]
        return start_job("submit", *given, "--", *job, **head.environment)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_job("scheduled_evaluation", *night(whole)).code == 0
    first = trigger()
    blocks = "runs/.1.*/**/blocks/pair_distances/block-*"
    assert wait_until(lambda: first.poll() is not None or any(killed.glob(blocks)), 250)
    for pid in drivers_of(killed):
        os.kill(pid, signal.SIGKILL)
    said = first.communicate(timeout=200)
    assert first.returncode == 1, said
    assert not (killed / "history.parquet").exists()
    second = trigger()
    said = second.communicate(timeout=250)
    assert second.returncode == 0, said
    assert "night ended without an answer (FAILED): started again" in said[1]
    assert (killed / "history.parquet").read_bytes() == (whole / "history.parquet").read_bytes()
    assert bytes_of(killed / "runs" / "1") == bytes_of(whole / "runs" / "1")


def drivers_of(folder: Path) -> list[int]:
    """Processes of the night that writes below `folder`, on the cluster's side; at least one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"scheduled-evaluation" in words and f"{folder}/runs".encode() in words and b"submit" not in words:
            found.append(int(entry.name))
    assert found
    return found


def wait_until_running(head: Head, submission_id: str) -> None:
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline:
        jobs = {job["submission_id"]: job["status"] for job in ask(head.address, head.environment, "/api/jobs/")}
        if jobs.get(submission_id) == "RUNNING":
            return
        time.sleep(0.5)
    pytest.fail(f"{submission_id} does not run")
