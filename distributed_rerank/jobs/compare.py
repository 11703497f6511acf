"""Evaluations and other systems' runs side by side."""

import logging

from distributed_rerank.config.jobs import CompareJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.monitoring.many_runs import compare_all

logger = logging.getLogger(__name__)


def main(job: CompareJob, catalogue: Catalogue | None) -> None:
    """Write the table to the folder --out."""
    missing = job.missing_lists or "error"
    table = compare_all(
        job.results, job.out, catalogue=catalogue, missing_lists=missing, seed=job.seed, overwrite=job.overwrite
    )
    logger.info("comparison\n%s", table)
    logger.info("%s has it as Markdown, LaTeX, HTML and JSON", job.out)
