"""Metrics before and after re-ranking, with intervals, costs and a report. Without --model, the first stage
alone.

    python jobs/evaluate.py --catalogue photos/df.csv --out runs/evaluation --model runs/model \\
        --extractor vit_small_patch16_224.dino

Queries and gallery are the rows of --split (default: validation). The first stage is exact search over
embeddings that are computed here, or were made earlier (--embeddings), or any lists (--candidates). The model
folder's chain.json says how logits and distances become an order; --chain replace is open-metric-learning's
rule, --chain first_stage none. A second start of the same command continues a killed run and says so if there
is nothing left to do.
"""

import dataclasses
import logging
from pathlib import Path

import tyro

from distributed_rerank import command_line
from distributed_rerank.arguments import MeasureArguments, RerankerArguments
from distributed_rerank.cluster.executors import connect_when_needed, executors_on
from distributed_rerank.cluster.session import ClusterConfig
from distributed_rerank.command_line import FirstStageArguments
from distributed_rerank.data import artifacts
from distributed_rerank.data.catalogue import read_catalogue
from distributed_rerank.evaluation.exports import export_markdown, export_trec
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.monitoring.comparison import (
    catalogue_of,
    compare_runs,
    comparison_in_text,
    require_same_catalogue,
)
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.config import EvaluationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    catalogue: str
    """CSV or Parquet table with label, path, split, is_query, is_gallery; a path or a URI."""
    out: Path
    """Folder for metrics.json, per_query.parquet, report.html and what they rest on."""
    first_stage: tyro.conf.OmitArgPrefixes[FirstStageArguments] = FirstStageArguments()
    reranker: tyro.conf.OmitArgPrefixes[RerankerArguments] = RerankerArguments()
    measuring: tyro.conf.OmitArgPrefixes[MeasureArguments] = MeasureArguments()
    split: str = "validation"
    baseline: Path | None = None
    """Evaluation folder of the same catalogue to compare the final ranking with; written to OUT/comparison.json."""
    trec: Path | None = None
    """Folder for first_stage.trec, reranked.trec and qrels.trec."""
    markdown: Path | None = None
    """File for a summary that fits a pull request."""
    overwrite: bool = False
    """Recompute a folder that another configuration made."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()


def main(arguments: Arguments) -> None:
    catalogue = read_catalogue(arguments.catalogue, purpose="evaluation").restrict(arguments.split)
    if arguments.baseline is not None:
        baseline = f"--baseline {arguments.baseline}"
        require_same_catalogue(baseline, catalogue_of(arguments.baseline), "this run", catalogue.digest())
    model, chain = arguments.reranker.load()
    config = EvaluationConfig(**arguments.first_stage.parts(), **arguments.measuring.settings())
    with connect_when_needed(arguments.cluster) as session:
        metrics = evaluate(
            catalogue,
            config,
            arguments.out,
            model=model,
            chain=chain,
            steps=executors_on(session),
            overwrite=arguments.overwrite,
        )
    if arguments.baseline is not None:
        comparison = compare_runs(arguments.baseline, arguments.out, seed=arguments.measuring.seed)
        artifacts.write_json(arguments.out / "comparison.json", comparison.summary)
        logging.info("\n%s", comparison_in_text(comparison.summary))
    if arguments.trec is not None:
        export_trec(arguments.out, catalogue, arguments.trec, arguments.first_stage.candidates)
    if arguments.markdown is not None:
        export_markdown(arguments.out, arguments.markdown)
    logging.info("\n%s\nreport: %s", table_in_text(metrics), arguments.out / "report.html")


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
