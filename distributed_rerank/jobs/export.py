"""Model folder -> ONNX files with known pairs."""

import logging

from distributed_rerank.config.jobs import ExportJob
from distributed_rerank.online.onnx_files import export_model, verify

logger = logging.getLogger(__name__)


def main(job: ExportJob) -> None:
    """Write the export to the folder --out."""
    export_model(job.model, job.out)
    logger.info("%s: logits differ by %.2g at most from the model's", job.out, verify(job.out))
