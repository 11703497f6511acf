"""Catalogue -> pairwise model and its chain."""

import logging

from distributed_rerank.config.jobs import TrainJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.models.saving import build_model
from distributed_rerank.training.distillation import read_teacher
from distributed_rerank.training.stage import train

logger = logging.getLogger(__name__)


def main(job: TrainJob, catalogue: Catalogue) -> None:
    """Train on the split `train` and write the model folder --out."""
    if getattr(job.pairwise, "pairwise_weights", None) is not None:
        build_model(job.pairwise)  # weights that do not fit are found before Ray starts
    teacher = None if job.teacher is None else read_teacher(job.teacher)
    with executors_for(job.cluster, job.retry) as (executors, fit):
        chain = train(
            catalogue,
            job.pairwise,
            job.training,
            job.out,
            work=job.work,
            executors=executors,
            fit=fit,
            teacher=teacher,
            embeddings_folder=job.embeddings,
            evidence=job.evidence,
            services=job.track,
            overwrite=job.overwrite,
        )
    logger.info("model: %s; chain: %s", job.out, chain.describe())
