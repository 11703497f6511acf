"""Catalogue -> embeddings."""

import logging

from distributed_rerank import extraction
from distributed_rerank.config.jobs import EmbedJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.models.adapter import load_adapter

logger = logging.getLogger(__name__)


def main(job: EmbedJob, catalogue: Catalogue) -> None:
    """Embed the catalogue's images into the folder --out."""
    adapter = None if job.adapt is None else load_adapter(job.adapt)
    with executors_for(job.cluster) as (executors, _):
        embeddings = extraction.embed(
            catalogue, job.extractor, job.out, work=job.work, executors=executors, overwrite=job.overwrite
        )
    if adapter is not None:
        embeddings.mapped(adapter, job.out / "adapted.parquet")
    n_rejected, n_others = len(embeddings.rejects_among(catalogue.ids)), len(embeddings)
    n_others -= len(catalogue) - n_rejected
    others = f", beside {n_others:,} of other catalogues" if n_others else ""
    logger.info(
        "%s images embedded, %d rejected%s: %s", f"{len(catalogue) - n_rejected:,}", n_rejected, others, job.out
    )
