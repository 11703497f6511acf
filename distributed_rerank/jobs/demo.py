"""The whole path on a generated catalogue."""

import dataclasses
import logging

from distributed_rerank import extraction
from distributed_rerank.config.evaluation import FirstStageConfig, RerankerConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.jobs import DemoJob
from distributed_rerank.config.pairwise import DistanceSiameseConfig, TokenSiameseConfig
from distributed_rerank.config.training import EXTRACTOR_DEFAULTS, EvidenceConfig, TrainingConfig
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.demo.catalogue import write_demo_catalogue
from distributed_rerank.errors import BadInput, TakenFolder
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.jobs.connection import executors_for
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.training.stage import EXTRACTOR_WEIGHTS, train

logger = logging.getLogger(__name__)

UNTRAINED = ExtractorConfig(
    name="test_resnet", weights="none", args={"norm_layer": "groupnorm1"}, image_size=96, precision="fp32"
)
EXTRACTOR_TRAINING = dataclasses.replace(
    EXTRACTOR_DEFAULTS, epochs=12, n_labels=15, lr=3e-3, backbone_lr=3e-3, set_aside=0.5, patience=0, threads=2
)


def main(job: DemoJob) -> None:
    """Generate, embed, train and evaluate in the folder --out."""
    try:
        _run(job)
    except TakenFolder as error:
        raise BadInput(f"{error.problem}; give another --out, or delete {job.out}") from None


def _run(job: DemoJob) -> None:
    out = job.out
    logger.info("1/4 generating the catalogue")
    catalogue = read_catalogue(str(write_demo_catalogue(out / "catalogue")), purpose="training")
    logger.info("2/4 training a small extractor from scratch on the train labels")
    embedding_distance = DistanceSiameseConfig(extractor=UNTRAINED, linear=False)
    none_seen = EvidenceConfig(extractor_trained_on="none")
    train(catalogue, embedding_distance, EXTRACTOR_TRAINING, out / "extractor", evidence=none_seen)
    extractor = dataclasses.replace(UNTRAINED, weights=str(out / "extractor" / EXTRACTOR_WEIGHTS))
    with executors_for(job.cluster) as (executors, fit):
        logger.info("3/4 embedding all photos on Ray Data, training the pairwise model on Ray Train")
        embeddings, model_folder = out / "embeddings", out / "model"
        extraction.embed(catalogue, extractor, embeddings, executors=executors)
        train(
            catalogue,
            TokenSiameseConfig(extractor=extractor),
            TrainingConfig(epochs=5),
            model_folder,
            executors=executors,
            fit=fit,
            embeddings_folder=embeddings,
        )
        logger.info("4/4 evaluating labels that nothing was trained on")
        model, chain = load_model_and_chain(RerankerConfig(model=str(model_folder)))
        validation, candidates = catalogue.restrict("validation"), FirstStageConfig(embeddings=embeddings)
        metrics = evaluate(validation, candidates, out / "evaluation", model=model, chain=chain, executors=executors)
    logger.info("metrics\n%s", table_in_text(metrics))
    logger.info("report: %s", (out / "evaluation" / "report.html").absolute())
