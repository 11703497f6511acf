"""Catalogue -> embeddings (Parquet by id), on Ray Data.

    python jobs/embed.py --catalogue photos/df.csv --out runs/embeddings --extractor
    vit_small_patch16_224.dino

The table needs only the column `path` (and `id` where paths repeat). A second run computes only the ids that
are missing; a killed one continues. Images that cannot be read are listed with the reason in rejects.parquet.
About 12 images/s with ViT-S/16 on 2 CPU cores, some thousands on a GPU.
"""

import dataclasses
import logging
from pathlib import Path

import tyro

from distributed_rerank import command_line, extraction
from distributed_rerank.cluster.executors import connect_when_needed, executors_on
from distributed_rerank.cluster.session import ClusterConfig
from distributed_rerank.command_line import ExtractorArguments
from distributed_rerank.data.catalogue import read_catalogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    catalogue: str
    """CSV or Parquet table; a path or a URI."""
    out: Path
    """Folder for embeddings.parquet, rejects.parquet and manifest.json."""
    extractor: tyro.conf.OmitArgPrefixes[ExtractorArguments]
    split: str | None = None
    """Embed only the rows of this split, e.g. validation."""
    max_rejects: float = 0.001
    """Share of the images that may be unreadable before the job fails."""
    overwrite: bool = False
    """Recompute a folder that another configuration made."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()


def main(arguments: Arguments) -> None:
    catalogue = read_catalogue(arguments.catalogue)
    if arguments.split is not None:
        catalogue = catalogue.restrict(arguments.split)
    config = arguments.extractor.extraction()
    with connect_when_needed(arguments.cluster) as session:
        embeddings = extraction.embed(
            catalogue,
            config,
            arguments.out,
            extract=executors_on(session).extract,
            overwrite=arguments.overwrite,
            max_rejects=arguments.max_rejects,
        )
    logging.info("%d embeddings, %d rejects: %s", len(embeddings.ids), len(embeddings.rejects), arguments.out)


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
