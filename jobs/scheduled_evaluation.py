"""Evaluate on a date, append to a history, compare with the baseline and the run before; the exit code says regression.

    python jobs/scheduled_evaluation.py --catalogue photos/df.csv --model runs/model \\
        --extractor vit_small_patch16_224.dino --history nightly/history.parquet --runs nightly/runs \\
        --baseline runs/evaluation

Exit code 0: no regression. 3: the metric fell beyond --tolerance and beyond chance; the metric, its interval and the
worst category are named. 2: wrong input, e.g. a baseline of another catalogue. The run's folder RUNS/RUN_ID is what
jobs/evaluate.py writes, with verdict.json and the trend added; history.html beside the history shows all runs.
The same run id again continues a killed run, or says that it is done and ends with the same exit code as before.
jobs/examples/ has a crontab, a systemd timer and a Kubernetes CronJob.
"""

import dataclasses
import logging

import tyro

from distributed_rerank import command_line
from distributed_rerank.arguments import MeasureArguments, RerankerArguments
from distributed_rerank.cluster.executors import connect_when_needed, executors_on
from distributed_rerank.cluster.session import ClusterConfig
from distributed_rerank.command_line import FirstStageArguments
from distributed_rerank.data.catalogue import read_catalogue
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.monitoring.scheduled_run import ScheduleConfig, check, conclude
from distributed_rerank.report.console import table_in_text
from distributed_rerank.reranking.config import EvaluationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    schedule: tyro.conf.OmitArgPrefixes[ScheduleConfig]
    catalogue: str
    """CSV or Parquet table with label, path, split, is_query, is_gallery; a path or a URI."""
    first_stage: tyro.conf.OmitArgPrefixes[FirstStageArguments] = FirstStageArguments()
    reranker: tyro.conf.OmitArgPrefixes[RerankerArguments] = RerankerArguments()
    measuring: tyro.conf.OmitArgPrefixes[MeasureArguments] = MeasureArguments()
    split: str = "validation"
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig] = ClusterConfig()


def main(arguments: Arguments) -> int:
    schedule, given = arguments.schedule, arguments
    catalogue = read_catalogue(given.catalogue, purpose="evaluation").restrict(given.split)
    check(schedule, catalogue, given.measuring.ks)
    model, chain = given.reranker.load()
    config = EvaluationConfig(**given.first_stage.parts(), **given.measuring.settings())
    with connect_when_needed(given.cluster) as session:
        metrics = evaluate(catalogue, config, schedule.folder, model=model, chain=chain, steps=executors_on(session))
    logging.info("\n%s\nreport: %s", table_in_text(metrics), schedule.folder / "report.html")
    return conclude(schedule, seed=given.measuring.seed).exit_code


if __name__ == "__main__":
    command_line.run(main, Arguments, __doc__ or "")
