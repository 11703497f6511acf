"""Evaluate under a run id, append to the history, compare with the baseline and the run before."""

import logging
from typing import Any

from distributed_rerank.config.jobs import ScheduledEvaluationJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput, TakenFolder
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.monitoring.alerts import told
from distributed_rerank.monitoring.scheduled_run import check, conclude
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.loading import load_model_and_chain

logger = logging.getLogger(__name__)


def main(job: ScheduledEvaluationJob, catalogue: Catalogue, train: Catalogue | None = None) -> int:
    """Evaluate into the run's folder; returns 3 for a regression, else 0."""
    figures: dict[str, Any] = {"exit_code": 1}
    with told(job.schedule, figures):
        try:
            return _run(job, catalogue, train, figures)
        except TakenFolder as error:
            remedy = "give another --run-id, or what that run was made with"
            raise BadInput(f"{error.problem}; {remedy}") from None


def _run(job: ScheduledEvaluationJob, catalogue: Catalogue, train: Catalogue | None, figures: dict[str, Any]) -> int:
    """Evaluate, compare and record; `figures` gets what is told to other programs."""
    schedule = job.schedule
    check(schedule, catalogue, job.measure)
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
    outcome = conclude(schedule, seed=job.measure.resampling_seed)
    figures.update(
        exit_code=outcome.exit_code,
        reason=outcome.reason,
        metrics=metrics.get("reranked") or metrics["first_stage"],
        changes=outcome.changes,
        n_queries=metrics["n_queries"],
        n_rejected=metrics["n_rejected"],
    )
    return outcome.exit_code
