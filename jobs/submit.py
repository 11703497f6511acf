"""Submit a command to a Ray cluster, show its log, end with its exit code. For cron, systemd and CI.

    python jobs/submit.py --address http://127.0.0.1:8265 --submission-id evaluation-2026-11-23 --working-dir . \\
        -- python jobs/scheduled_evaluation.py --catalogue s3://bucket/df.csv ...

`ray job submit` ends with 0 for a job that was stopped and with 1 for any failure. This ends with 0 where the job
succeeded, with the job's own exit code where it failed (2 bad input, 3 regression), with 130 where it was stopped.
A submission id that the cluster knows is not submitted again: its log is shown and its exit code returned, so a timer
that fires twice does the work once. Interrupting this command does not stop the job. A token is taken from the
environment as Ray does: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

import asyncio
import dataclasses
import logging
import shlex
import sys
import time
from typing import Annotated

import tyro
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from distributed_rerank import command_line
from distributed_rerank.errors import BadInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What to run on the cluster, after `--`."""
    submission_id: str
    """Unique on the cluster; the same id again attaches to the job that has it."""
    address: str = "http://127.0.0.1:8265"
    """Of the cluster's dashboard."""
    working_dir: str | None = None
    """Folder to upload and to run in, without what .gitignore and .rayignore name. Default: the cluster's own."""


def main(arguments: Arguments) -> int:
    if not arguments.command:
        raise BadInput("there is no command to submit; give it after --, e.g. -- python jobs/evaluate.py ...")
    try:
        client = JobSubmissionClient(arguments.address)
    except ConnectionError:
        raise BadInput(f"--address {arguments.address} does not answer; start the cluster or its tunnel") from None
    submit(client, arguments)
    asyncio.run(show_log(client, arguments.submission_id))
    return exit_code(wait(client, arguments.submission_id))


def submit(client: JobSubmissionClient, arguments: Arguments) -> None:
    """Submit the command, unless a job of this id runs it already. Raises BadInput where that job is another one."""
    entrypoint = shlex.join(arguments.command)
    known = {job.submission_id: job for job in client.list_jobs()}.get(arguments.submission_id)
    if known is None:
        runtime_env = {"working_dir": arguments.working_dir} if arguments.working_dir else {}
        client.submit_job(entrypoint=entrypoint, submission_id=arguments.submission_id, runtime_env=runtime_env)
    elif known.entrypoint != entrypoint:
        raise BadInput(f"--submission-id {arguments.submission_id} runs {known.entrypoint!r}; give another id")
    else:
        logging.info("%s is known to the cluster (%s): attached", arguments.submission_id, known.status.value)


async def show_log(client: JobSubmissionClient, submission_id: str) -> None:
    """Copy the job's log to standard output until it ends."""
    try:
        async for lines in client.tail_job_logs(submission_id):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except RuntimeError as error:
        logging.warning("the log is cut off (%s); waiting for the job", error)


def wait(client: JobSubmissionClient, submission_id: str, seconds: float = 1.0) -> JobDetails:
    """The job's details once it has ended; a log may end a moment before its job."""
    while not (job := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(seconds)
    return job


def exit_code(job: JobDetails) -> int:
    """What this process ends with. A failure never counts as 0, nor does a stop, whatever the driver returned."""
    logging.info("%s: %s", job.status.value, (job.message or "").strip())
    if job.status == JobStatus.STOPPED:
        return 130
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code or 1
    return code if 0 < code < 256 else 1


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
