"""Candidate lists -> re-ordered lists, without labels."""

import dataclasses
import logging

from distributed_rerank.config.jobs import RerankJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.reranking.rerank import rerank
from distributed_rerank.reranking.run import load_model_and_chain

logger = logging.getLogger(__name__)


def main(job: RerankJob, catalogue: Catalogue) -> None:
    """Re-order the lists of the catalogue's queries into the folder --out."""
    model, chain = load_model_and_chain(job.reranker)
    assert model is not None, "--model is required"
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
