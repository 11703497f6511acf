"""The whole path on a generated catalogue, on local Ray: under 3 minutes on 2 cores, no network, no weights.

    python jobs/demo.py --out out/demo

120 product designs in look-alike families, 6 photos each, labels of `train` and `validation` disjoint. A small network
(timm's test_resnet, untrained) is first trained as extractor on the train labels; then a pairwise model on Ray Train,
with a chain chosen on train labels that it was not trained on; then the validation labels, which nothing has seen,
are evaluated before and after re-ranking. The figures are what came out: if re-ranking did not help, it says so.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import tyro

from distributed_rerank import command_line
from distributed_rerank.cluster import training as on_ray
from distributed_rerank.cluster.executors import executors_on
from distributed_rerank.cluster.session import ClusterConfig, connect
from distributed_rerank.data.catalogue import read_catalogue
from distributed_rerank.demo.catalogue import write_demo_catalogue
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.extraction import ExtractionConfig, embed
from distributed_rerank.models.distance_siamese import DistanceSiameseConfig
from distributed_rerank.models.extractor import ExtractorConfig
from distributed_rerank.models.token_siamese import TokenSiameseConfig
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.config import EvaluationConfig
from distributed_rerank.reranking.run import load_model_and_chain
from distributed_rerank.training.config import EXTRACTOR_DEFAULTS, TrainingConfig
from distributed_rerank.training.stage import EXTRACTOR_WEIGHTS, train

UNTRAINED = ExtractorConfig(
    name="test_resnet",
    weights="none",
    args={"norm_layer": "groupnorm1"},
    image_size=96,
    resize="square",
    precision="fp32",
)
EXTRACTOR_TRAINING = dataclasses.replace(
    EXTRACTOR_DEFAULTS, epochs=12, n_labels=15, lr=3e-3, backbone_lr=3e-3, set_aside=0.1, patience=0, threads=2
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    out: Path = Path("out/demo")
    """Folder for the catalogue, the models and the report."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()


def main(arguments: Arguments) -> None:
    out = arguments.out
    logging.info("1/4 generating the catalogue")
    catalogue = read_catalogue(str(write_demo_catalogue(out / "catalogue")), purpose="training")
    logging.info("2/4 training a small extractor from scratch on the train labels")
    distance = DistanceSiameseConfig(extractor=UNTRAINED, linear=False)
    train(catalogue, ExtractionConfig(extractor=UNTRAINED), distance, EXTRACTOR_TRAINING, out / "extractor")
    extractor = dataclasses.replace(UNTRAINED, weights=str(out / "extractor" / EXTRACTOR_WEIGHTS))
    extraction = ExtractionConfig(extractor=extractor)
    with connect(arguments.cluster) as session:
        steps = executors_on(session)
        logging.info("3/4 embedding all photos on Ray Data, training the pairwise model on Ray Train")
        embeddings = out / "embeddings"
        embed(catalogue, extraction, embeddings, extract=steps.extract)
        fit = partial(on_ray.fit, session=session)
        pairwise, model_folder = TokenSiameseConfig(extractor=extractor), out / "model"
        train(
            catalogue, extraction, pairwise, TrainingConfig(epochs=5), model_folder,
            extract=steps.extract, search=steps.search, fit=fit, embeddings_folder=embeddings,
        )  # fmt: skip
        logging.info("4/4 evaluating labels that nothing was trained on")
        model, chain = load_model_and_chain(str(model_folder), "model", None)
        validation, config = catalogue.restrict("validation"), EvaluationConfig(embeddings=embeddings)
        metrics = evaluate(validation, config, out / "evaluation", model=model, chain=chain, steps=steps)
    logging.info("\n%s\nreport: %s", table_in_text(metrics), (out / "evaluation" / "report.html").absolute())


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
