"""Metrics before and after re-ranking."""

import logging

from distributed_rerank.config.jobs import EvaluateJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.evaluation.exports import export_markdown, export_trec
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.monitoring.comparison import (
    catalogue_of,
    compare_runs,
    comparison_in_text,
    require_same_catalogue,
)
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.storage.files import write_json

logger = logging.getLogger(__name__)


def main(job: EvaluateJob, catalogue: Catalogue, train: Catalogue | None = None) -> None:
    """Evaluate the catalogue's queries into the folder --out, then compare and export what was asked for."""
    if job.baseline is not None:
        digest = catalogue_of(job.baseline)
        require_same_catalogue(f"--baseline {job.baseline}", digest, "this run", catalogue.digest())
    model, chain = load_model_and_chain(job.reranker)
    with executors_for(job.cluster) as (executors, _):
        metrics = evaluate(
            catalogue,
            job.first_stage,
            job.out,
            model=model,
            chain=chain,
            measure=job.measure,
            work=job.work,
            executors=executors,
            train=train,
            overwrite=job.overwrite,
        )
    if job.baseline is not None:
        comparison = compare_runs(job.baseline, job.out, seed=job.measure.resampling_seed)
        write_json(job.out / "comparison.json", comparison.summary)
        logger.info("comparison with %s\n%s", job.baseline, comparison_in_text(comparison.summary))
    if job.trec is not None:
        export_trec(job.out, catalogue, job.trec, job.first_stage.candidates)
    if job.markdown is not None:
        export_markdown(job.out, job.markdown)
    logger.info("metrics\n%s", table_in_text(metrics))
    logger.info("report: %s", job.out / "report.html")
