"""Submit a command to a Ray cluster, show its log, tell how it ended."""

import asyncio
import logging
import shlex
import sys
import time

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from distributed_rerank.config.jobs import SubmitJob
from distributed_rerank.errors import BadInput

logger = logging.getLogger(__name__)


def main(job: SubmitJob) -> int:
    """Submit, show the log, wait; returns the exit code that the outcome means."""
    if not job.command:
        raise BadInput("there is no command to submit; give it after --, e.g. -- python jobs/evaluate.py ...")
    try:
        client = JobSubmissionClient(job.address)
    except ConnectionError:
        raise BadInput(f"--address {job.address} does not answer; start the cluster or its tunnel") from None
    submit(client, job)
    asyncio.run(show_log(client, job.submission_id))
    return exit_code(wait(client, job.submission_id))


def submit(client: JobSubmissionClient, job: SubmitJob) -> None:
    """Submit the command, unless a job of this id runs it already. Raises BadInput where that job is another one."""
    entrypoint = shlex.join(job.command)
    known = {job.submission_id: job for job in client.list_jobs()}.get(job.submission_id)
    if known is None:
        runtime_env = {"working_dir": job.working_dir} if job.working_dir else {}
        client.submit_job(entrypoint=entrypoint, submission_id=job.submission_id, runtime_env=runtime_env)
    elif known.entrypoint != entrypoint:
        raise BadInput(f"--submission-id {job.submission_id} runs {known.entrypoint!r}; give another id")
    else:
        logger.info("%s is known to the cluster (%s): attached", job.submission_id, known.status.value)


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
