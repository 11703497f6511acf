"""Evaluate under a run id, append to the history, compare with the baseline and the run before."""

import logging

from distributed_rerank.config.jobs import ScheduledEvaluationJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.monitoring.scheduled_run import check, conclude
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.run import load_model_and_chain

logger = logging.getLogger(__name__)


def main(job: ScheduledEvaluationJob, catalogue: Catalogue, train: Catalogue | None = None) -> int:
    """Evaluate into the run's folder; returns 3 for a regression, else 0."""
    schedule = job.schedule
    check(schedule, catalogue, job.measure.ks)
    model, chain = load_model_and_chain(job.reranker)
    with executors_for(job.cluster) as (executors, _):
        metrics = evaluate(
            catalogue,
            job.first_stage,
            schedule.folder,
            model=model,
            chain=chain,
            measure=job.measure,
            work=job.work,
            executors=executors,
            train=train,
        )
    logger.info("metrics\n%s", table_in_text(metrics))
    logger.info("report: %s", schedule.folder / "report.html")
    return conclude(schedule, seed=job.measure.resampling_seed).exit_code
