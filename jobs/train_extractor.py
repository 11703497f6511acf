"""Catalogue -> extractor weights: an embedding fine-tuned on your labels, the first step before re-ranking.

    python jobs/train_extractor.py --catalogue photos/df.csv --out runs/extractor --extractor vit_small_patch16_224.dino

Trains the network of --extractor on split `train`, each image against all others of a balanced batch (supervised
contrastive loss on the distances); the epoch that ranks labels set aside from `train` best is kept. The folder's
extractor.safetensors is then given to the other jobs: --extractor NAME --extractor-weights
runs/extractor/extractor.safetensors. The folder is a `distance` pairwise model as well. A second start of the same
command continues after the last finished epoch.
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
from distributed_rerank.command_line import ExtractorArguments
from distributed_rerank.data.catalogue import read_catalogue
from distributed_rerank.models.distance_siamese import DistanceSiameseConfig
from distributed_rerank.training.config import EXTRACTOR_DEFAULTS, TrainingConfig
from distributed_rerank.training.stage import EXTRACTOR_WEIGHTS, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    catalogue: str
    """CSV or Parquet table with label, path, split, is_query, is_gallery; a path or a URI."""
    out: Path
    """Folder for extractor.safetensors and the record of the training."""
    extractor: tyro.conf.OmitArgPrefixes[ExtractorArguments] = ExtractorArguments()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = EXTRACTOR_DEFAULTS
    max_rejects: float = 0.001
    """Share of the images that may be unreadable before the job fails."""
    overwrite: bool = False
    """Recompute a folder that another configuration made."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()
    retry: tyro.conf.OmitArgPrefixes[on_ray.RetryConfig] = on_ray.RetryConfig()


def main(arguments: Arguments) -> None:
    catalogue = read_catalogue(arguments.catalogue, purpose="training")
    extraction = arguments.extractor.extraction()
    with connect_when_needed(arguments.cluster) as session:
        steps = executors_on(session)
        train(
            catalogue,
            extraction,
            DistanceSiameseConfig(extractor=extraction.extractor, linear=False),
            arguments.training,
            arguments.out,
            extract=steps.extract,
            search=steps.search,
            fit=lambda task, folder: on_ray.fit(task, folder, session=session(), retry=arguments.retry),
            max_rejects=arguments.max_rejects,
            overwrite=arguments.overwrite,
        )
    logging.info("extractor weights: %s", arguments.out / EXTRACTOR_WEIGHTS)


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
