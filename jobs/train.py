"""Catalogue -> pairwise model and its re-ranking chain, on Ray Train.

    python jobs/train.py --catalogue photos/df.csv --out runs/model --extractor vit_small_patch16_224.dino

Trains on the rows of split `train`. A share of their labels is set aside: early stopping, fusion weight and
the chain are chosen on them, and if they show no gain the chain says "first stage". The folder holds
config.json, model.safetensors, chain.json, training.json, curves.png and TensorBoard files; jobs/evaluate.py
and jobs/rerank.py load it by path. A second start of the same command continues after the last finished
epoch. --pairwise-model concat with --mining batch --loss bce is open-metric-learning's recipe.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import tyro

from distributed_rerank import command_line
from distributed_rerank.cluster import training as on_ray
from distributed_rerank.cluster.executors import connect_when_needed, executors_on
from distributed_rerank.cluster.session import ClusterConfig
from distributed_rerank.command_line import ExtractorArguments, PairwiseArguments
from distributed_rerank.data.catalogue import read_catalogue
from distributed_rerank.training.config import TrainingConfig
from distributed_rerank.training.distillation import read_teacher
from distributed_rerank.training.stage import build_model, train
from distributed_rerank.training.tracking import Service


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    catalogue: str
    """CSV or Parquet table with label, path, split, is_query, is_gallery; a path or a URI."""
    out: Path
    """Folder for the model."""
    extractor: tyro.conf.OmitArgPrefixes[ExtractorArguments] = ExtractorArguments()
    pairwise: tyro.conf.OmitArgPrefixes[PairwiseArguments] = PairwiseArguments()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    teacher: str | None = None
    """Folder of a slower pairwise model (concat, say) that this one learns from as well as from the labels."""
    embeddings: Path | None = None
    """Folder of jobs/embed.py; what it lacks is added."""
    track: tuple[Service, ...] = ()
    """mlflow, wandb: further trackers beside TensorBoard."""
    max_rejects: float = 0.001
    """Share of the images that may be unreadable before the job fails."""
    overwrite: bool = False
    """Recompute a folder that another configuration made."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()
    retry: tyro.conf.OmitArgPrefixes[on_ray.RetryConfig] = on_ray.RetryConfig()


def main(arguments: Arguments) -> None:
    catalogue = read_catalogue(arguments.catalogue, purpose="training")
    extraction = arguments.extractor.extraction()
    model_config = arguments.pairwise.config(extraction.extractor)
    if arguments.pairwise.pairwise_weights is not None:
        build_model(model_config)  # weights that do not fit are found before Ray starts
    teacher = None if arguments.teacher is None else read_teacher(arguments.teacher)
    with connect_when_needed(arguments.cluster) as session:
        steps = executors_on(session)
        chain = train(
            catalogue,
            extraction,
            model_config,
            arguments.training,
            arguments.out,
            extract=steps.extract,
            search=steps.search,
            fit=lambda task, folder: on_ray.fit(task, folder, session=session(), retry=arguments.retry),
            score=steps.score,
            teacher=teacher,
            embeddings_folder=arguments.embeddings,
            services=arguments.track,
            max_rejects=arguments.max_rejects,
            overwrite=arguments.overwrite,
        )
    logging.info("model: %s; chain: %s", arguments.out, chain.describe())


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "", defaults=command_line.training_defaults)
