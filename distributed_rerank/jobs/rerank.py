"""Candidate lists -> re-ordered lists, without labels."""

import dataclasses
import logging

from distributed_rerank.config.jobs import RerankJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.monitoring import unlabelled
from distributed_rerank.monitoring.scheduled_run import EXIT_REGRESSION
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.reranking.rerank import rerank

logger = logging.getLogger(__name__)


def main(job: RerankJob, catalogue: Catalogue) -> int:
    """Re-order the lists of the catalogue's queries into the folder --out; 3 where they drifted from --expect-from."""
    model, chain = load_model_and_chain(job.reranker)
    assert model is not None, "--model is required"
    if job.expect_from is not None:
        unlabelled.check_source(job.expect_from, model.identity(), chain.identity())
    config = job.first_stage
    if job.query_catalogue is not None and config.missing_lists is None:
        config = dataclasses.replace(config, missing_lists="error")
    with executors_for(job.cluster) as (executors, _):
        table = rerank(
            catalogue,
            config,
            job.out,
            model=model,
            chain=chain,
            work=job.work,
            executors=executors,
            overwrite=job.overwrite,
        )
    logger.info("%d candidates: %s", len(table), job.out / "reranked.parquet")
    if job.expect_from is None:
        return 0
    expected = unlabelled.expect(job.expect_from, job.out)
    has_drifted = expected["drift"]["alarm"]
    logger.log(logging.WARNING if has_drifted else logging.INFO, "%s", unlabelled.in_words(expected))
    return EXIT_REGRESSION if has_drifted else 0
