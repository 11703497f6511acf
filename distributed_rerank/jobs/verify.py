"""An export's logits against the known ones."""

import logging

from distributed_rerank.config.jobs import VerifyJob
from distributed_rerank.online.onnx_files import verify

logger = logging.getLogger(__name__)


def main(job: VerifyJob) -> None:
    """Exit code 2 where the logits differ."""
    logger.info("%s: logits differ by %.2g at most from the model's", job.folder, verify(job.folder))
