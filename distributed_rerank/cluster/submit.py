"""Submit a command to a Ray cluster, show its log, tell how it ended."""

import asyncio
import itertools
import logging
import shlex
import sys
import time
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from distributed_rerank.config.jobs import SubmitJob
from distributed_rerank.errors import BadInput, Outage

logger = logging.getLogger(__name__)

EXIT_REGRESSION = 3
NO_AGENT, AGENT_S = "No available agent", 60.0
"""What a head says whose agents have not started yet, and the seconds that they get."""


def main(job: SubmitJob) -> int:
    """Submit, show the log, wait; returns the exit code that the outcome means."""
    if not job.command:
        raise BadInput("there is no command to submit; give it after --, e.g. -- distributed-rerank evaluate ...")
    try:
        client = JobSubmissionClient(job.address)
    except ConnectionError:
        raise Outage(f"--address {job.address} does not answer; start the cluster or its tunnel") from None
    submission_id = submit(client, job)
    asyncio.run(show_log(client, submission_id))
    return exit_code(wait(client, submission_id))


def submit(client: JobSubmissionClient, job: SubmitJob) -> str:
    """Submit the command unless a job of this id runs it or has answered; returns the id on the cluster.

    A job that crashed or was stopped is submitted again, under the id with the next number. Raises BadInput where the
    id runs another command.
    """
    entrypoint = shlex.join(job.command)
    jobs = {known.submission_id: known for known in client.list_jobs()}
    names = itertools.chain([job.submission_id], (f"{job.submission_id}.{number}" for number in itertools.count(2)))
    attempts = list(itertools.takewhile(lambda name: name in jobs, names))
    for known in [jobs[name] for name in attempts]:
        if known.entrypoint != entrypoint:
            raise BadInput(f"--submission-id {job.submission_id} runs {known.entrypoint!r}; give another id")
    if attempts and _is_answer(jobs[attempts[-1]]):
        logger.info("%s is known to the cluster (%s): attached", attempts[-1], jobs[attempts[-1]].status.value)
        return attempts[-1]
    name = f"{job.submission_id}.{len(attempts) + 1}" if attempts else job.submission_id
    if attempts:
        logger.info("%s ended without an answer (%s): started again", attempts[-1], jobs[attempts[-1]].status.value)
    # A job that is stopped gets a minute to copy its unfinished work to its bucket; Ray's default is 3 s.
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "60", **dict(word.split("=", 1) for word in job.env)}
    runtime_env: dict[str, Any] = {"env_vars": variables}
    if job.working_dir:
        runtime_env["working_dir"] = job.working_dir
    words: dict[str, Any] = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": runtime_env}
    words |= {"entrypoint_num_cpus": job.driver_cpus, "entrypoint_num_gpus": job.driver_gpus}
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            client.submit_job(**words)
            return name
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def _is_answer(known: JobDetails) -> bool:
    """Whether the job still works or has said what there is to say: success, or a regression."""
    if not known.status.is_terminal() or known.status == JobStatus.SUCCEEDED:
        return True
    return known.status == JobStatus.FAILED and known.driver_exit_code == EXIT_REGRESSION


async def show_log(client: JobSubmissionClient, submission_id: str) -> None:
    """Copy the job's log to standard output until it ends."""
    try:
        async for lines in client.tail_job_logs(submission_id):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except RuntimeError as error:
        logger.warning("the log is cut off (%s); waiting for the job", error)


def wait(client: JobSubmissionClient, submission_id: str, seconds: float = 1.0) -> JobDetails:
    """The job's details once it has ended; a log may end a moment before its job."""
    while not (job := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(seconds)
    return job


def exit_code(details: JobDetails) -> int:
    """What this process ends with. A failure never counts as 0, nor does a stop, whatever the driver returned."""
    logger.info("%s: %s", details.status.value, (details.message or "").strip())
    if details.status == JobStatus.STOPPED:
        return 130
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code or 1
    return code if 0 < code < 256 else 1
