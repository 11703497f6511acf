"""Catalogue -> extractor weights."""

import logging

from distributed_rerank.config.jobs import TrainExtractorJob
from distributed_rerank.config.pairwise import DistanceSiameseConfig
from distributed_rerank.config.training import EvidenceConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.training.stage import EXTRACTOR_WEIGHTS, train

logger = logging.getLogger(__name__)


def main(job: TrainExtractorJob, catalogue: Catalogue) -> None:
    """Fine-tune the extractor on the split `train` and write the folder --out."""
    embedding_distance = DistanceSiameseConfig(extractor=job.extractor, linear=False)
    with executors_for(job.cluster, job.retry) as (executors, fit):
        train(
            catalogue,
            embedding_distance,
            job.training,
            job.out,
            work=job.work,
            executors=executors,
            fit=fit,
            evidence=EvidenceConfig(extractor_trained_on="none"),  # what is trained here may see every label
            overwrite=job.overwrite,
        )
    logger.info("extractor weights: %s", job.out / EXTRACTOR_WEIGHTS)
