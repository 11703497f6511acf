"""Candidate lists -> re-ordered lists, without labels: own lists, or those that any vector database returned.

    python jobs/rerank.py --catalogue photos.csv --candidates lists.parquet --model runs/model --out runs/reranked

The catalogue needs only `path` (and `id` as the candidates name them); --query-catalogue takes a table of its
own for the queries. Candidates are Parquet or CSV (query_id, gallery_id, distance or score) or a TREC run;
without --candidates they are searched for, with --extractor. The result, reranked.parquet, has a row for
every candidate: query_id, gallery_id, rank, distance, first_stage_rank, first_stage_distance, logit, probability
(of a match, as the labels set aside in training calibrated it; null where the pairwise model did not look).
"""

import dataclasses
import logging
from pathlib import Path

import tyro

from distributed_rerank import command_line
from distributed_rerank.arguments import RequiredRerankerArguments
from distributed_rerank.cluster.executors import connect_when_needed, executors_on
from distributed_rerank.cluster.session import ClusterConfig
from distributed_rerank.command_line import FirstStageArguments
from distributed_rerank.data.catalogue import read_catalogue, read_query_gallery
from distributed_rerank.reranking.config import EvaluationConfig
from distributed_rerank.reranking.rerank import rerank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    catalogue: str
    """CSV or Parquet table of the images; a path or a URI."""
    out: Path
    """Folder for reranked.parquet."""
    query_catalogue: str | None = None
    """Table of the queries, where they are not in the catalogue."""
    first_stage: tyro.conf.OmitArgPrefixes[FirstStageArguments] = FirstStageArguments()
    reranker: tyro.conf.OmitArgPrefixes[RequiredRerankerArguments]
    max_rejects: float = 0.001
    """Share of the images that may be unreadable before the job fails."""
    overwrite: bool = False
    """Recompute a folder that another configuration made."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()


def main(arguments: Arguments) -> None:
    if arguments.query_catalogue is not None:
        catalogue = read_query_gallery(arguments.query_catalogue, arguments.catalogue)
    else:
        catalogue = read_catalogue(arguments.catalogue).as_query_and_gallery()
    model, chain = arguments.reranker.load()
    assert model is not None, "--model is required"
    config = EvaluationConfig(**arguments.first_stage.parts(), max_rejects=arguments.max_rejects)
    with connect_when_needed(arguments.cluster) as session:
        table = rerank(
            catalogue,
            config,
            arguments.out,
            model=model,
            chain=chain,
            steps=executors_on(session),
            overwrite=arguments.overwrite,
        )
    logging.info("%d candidates: %s", len(table), arguments.out / "reranked.parquet")


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
