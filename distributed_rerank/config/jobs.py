"""The command line of each job: its manual and the configs that it is made of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from distributed_rerank.config.choices import MissingLists
from distributed_rerank.config.cluster import ClusterConfig, ObserveConfig, RetryConfig
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig, RerankerConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.importing import ImportConfig
from distributed_rerank.config.pairwise import PairwiseConfig, PairwiseName, TokenSiameseConfig, pairwise_config
from distributed_rerank.config.schedule import ScheduleConfig
from distributed_rerank.config.serving import ServeConfig
from distributed_rerank.config.training import EvidenceConfig, TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.errors import BadInput, check_numbers

TrackingService = Literal["mlflow", "wandb"]


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """A job that may run on Ray."""

    cluster: OmitArgPrefixes[ClusterConfig] = field(default_factory=ClusterConfig)
    observe: OmitArgPrefixes[ObserveConfig] = field(default_factory=ObserveConfig)


@dataclass(frozen=True, kw_only=True)
class OutJob(ClusterJob):
    """A job that writes one folder."""

    out: Path
    """Folder for the results."""


@dataclass(frozen=True, kw_only=True)
class CatalogueJob(ClusterJob):
    """A job on a catalogue."""

    catalogue: str
    """CSV or Parquet table of the images; a path or a URI."""
    image_root: tuple[str, ...] = ()
    """Folders and buckets (s3://NAME) that all images must lie in. Default: those that the table names; relative paths
    stay in the table's folder."""
    work: OmitArgPrefixes[WorkConfig] = field(default_factory=WorkConfig)


@dataclass(frozen=True, kw_only=True)
class LabelledJob(CatalogueJob):
    """A job that needs labels."""

    allow_shared_labels: bool = False
    """Accept labels that are in both splits. Figures of labels that training has seen are too good for new ones."""


@dataclass(frozen=True, kw_only=True)
class FolderJob(OutJob, CatalogueJob):
    """A job that turns a catalogue into one folder."""

    overwrite: bool = False
    """Recompute a folder that another configuration made."""


@dataclass(frozen=True, kw_only=True)
class ExtractorJob(FolderJob):
    """A job that needs an extractor."""

    extractor: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True, kw_only=True)
class EmbedJob(ExtractorJob):
    """Catalogue -> embeddings (Parquet by id), on Ray Data.

        distributed-rerank embed --catalogue photos/df.csv --out runs/embeddings --extractor vit_small_patch16_224.dino

    The table needs only the column `path` (and `id` where paths repeat). A second run computes only the ids that are
    missing; a killed one continues. Images that cannot be read are listed with the reason in rejects.parquet.
    """

    split: str | None = None
    """Embed only the rows of this split, e.g. validation."""
    adapt: Path | None = None
    """Model folder of `train`: the embeddings as its chain maps them before the search are written to
    OUT/adapted.parquet, for a vector database."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob(FolderJob, LabelledJob):
    """A job that trains."""

    training: Annotated[TrainingConfig, arg(name="")] = field(default_factory=TrainingConfig)
    retry: OmitArgPrefixes[RetryConfig] = field(default_factory=RetryConfig)


@dataclass(frozen=True, kw_only=True)
class TrainJob(TrainingJob):
    """Catalogue -> pairwise model and its re-ranking chain, on Ray Train.

        distributed-rerank train --catalogue photos/df.csv --out runs/model --extractor vit_small_patch16_224.dino

    Trains on the rows of split `train`. A share of their labels is set aside: early stopping, fusion weight and the
    chain are chosen on them, and if they show no gain the chain says "first stage". An extractor that knows the train
    labels needs others for that: rows of split `calibration`, or labels that `train-extractor` left out. The folder
    holds config.json, model.safetensors, chain.json, training.json, curves.svg and TensorBoard files; `evaluate` and
    `rerank` load it by path. A second start of the same command continues after the last finished epoch.
    --pairwise-model concat with --mining batch --loss bce is open-metric-learning's recipe.
    """

    pairwise_model: PairwiseName | str = "token"
    """token: correlation of cached local tokens; concat: OML's ConcatSiamese; split: a ViT whose first blocks run per
    image; distance: L2 distance of embeddings; package.module:Class: one of your own."""
    pairwise: OmitArgPrefixes[PairwiseConfig] = field(default_factory=TokenSiameseConfig)
    evidence: OmitArgPrefixes[EvidenceConfig] = field(default_factory=EvidenceConfig)
    teacher: str | None = None
    """Folder of a slower pairwise model that this one learns from as well as from the labels; or a file with another
    system's scores of pairs (query_id, gallery_id, score or distance)."""
    embeddings: Path | None = None
    """Folder of `embed`, where what it lacks is added; or any Parquet with id and embedding, taken as it is."""
    track: tuple[TrackingService, ...] = ()
    """mlflow, wandb: further trackers beside TensorBoard."""

    def __post_init__(self) -> None:
        pairwise_config(self.pairwise_model)


@dataclass(frozen=True, kw_only=True)
class TrainExtractorJob(ExtractorJob, TrainingJob):
    """Catalogue -> extractor weights: an embedding fine-tuned on your labels, the first step before re-ranking.

        distributed-rerank train-extractor --catalogue photos/df.csv --out runs/extractor \\
            --extractor vit_small_patch16_224.dino

    Trains the network of --extractor on split `train`, each image against all others of a balanced batch (supervised
    contrastive loss on the distances); the epoch that ranks labels set aside from `train` best is kept. The folder's
    extractor.safetensors is then given to the other jobs: --extractor NAME --extractor-weights
    runs/extractor/extractor.safetensors. The folder is a `distance` pairwise model as well. A second start of the same
    command continues after the last finished epoch.
    """


@dataclass(frozen=True, kw_only=True)
class RankingJob(CatalogueJob):
    """A job that re-ranks."""

    first_stage: OmitArgPrefixes[FirstStageConfig] = field(default_factory=FirstStageConfig)
    reranker: OmitArgPrefixes[RerankerConfig] = field(default_factory=RerankerConfig)


@dataclass(frozen=True, kw_only=True)
class QueriesJob:
    """A job on the queries of a split, and on what answers them."""

    split: str = "validation"
    """Queries and gallery are the rows of this split."""
    judgements: str | None = None
    """What answers each query, in place of the labels: TREC qrels, BEIR's table, or CSV or Parquet with query_id,
    gallery_id and relevance (above 0: relevant; below 0: left out of the lists, as the junk of ROxford)."""


@dataclass(frozen=True, kw_only=True)
class MeasuringJob(QueriesJob, RankingJob, LabelledJob):
    """A job that measures."""

    measure: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(MeasuringJob, FolderJob):
    """Metrics before and after re-ranking, with intervals, costs and a report. Without --model, the first stage alone.

        distributed-rerank evaluate --catalogue photos/df.csv --out runs/evaluation --model runs/model \\
            --extractor vit_small_patch16_224.dino

    Queries and gallery are the rows of --split (default: validation). The first stage is exact search over embeddings
    that are computed here, or were made earlier (--embeddings), or any lists (--candidates). The model folder's
    chain.json says how logits and distances become an order; --chain replace is open-metric-learning's rule, --chain
    first_stage none. A second start of the same command continues a killed run and says so if there is nothing left to
    do.
    """

    baseline: Path | None = None
    """Evaluation folder of the same catalogue to compare the final ranking with; written to OUT/comparison.json."""
    trec: Path | None = None
    """Folder for first_stage.trec, reranked.trec and qrels.trec."""
    markdown: Path | None = None
    """File for a summary that fits a pull request."""


@dataclass(frozen=True, kw_only=True)
class RerankJob(RankingJob, FolderJob):
    """Candidate lists -> re-ordered lists, without labels: own lists, or those that any vector database returned.

        distributed-rerank rerank --catalogue photos.csv --candidates lists.parquet --model runs/model \\
            --out runs/reranked

    The catalogue needs only `path` (and `id` as the candidates name them); --query-catalogue takes a table of its own
    for the queries. Candidates are Parquet or CSV (query_id, gallery_id, distance or score) or a TREC run; without
    --candidates they are searched for, with --extractor. The result, reranked.parquet, has a row for every candidate:
    query_id, gallery_id, rank, distance, first_stage_rank, first_stage_distance, logit, probability (of a match, as the
    labels set aside in training calibrated it; null where the pairwise model did not look).

    With --expect-from, an evaluation of labelled queries by the same model, the log and expected.json tell how often
    the first place is expected to be right, with an interval, and whether these queries have drifted from the labelled
    ones: then the exit code is 3 (one night in a hundred without cause).
    """

    query_catalogue: str | None = None
    """Table of the queries, where they are not in the catalogue."""
    expect_from: Path | None = None
    """Evaluation folder whose labelled queries say what to expect of these; written to OUT/expected.json."""


@dataclass(frozen=True, kw_only=True)
class ScheduledEvaluationJob(MeasuringJob):
    """Evaluate on a date, append to a history, compare with the baseline and the run before; the exit code tells.

        distributed-rerank scheduled-evaluation --catalogue photos/df.csv --model runs/model \\
            --extractor vit_small_patch16_224.dino --history nightly/history.parquet --runs nightly/runs \\
            --baseline runs/evaluation

    Exit code 0: no regression. 3: the metric fell beyond --tolerance and beyond chance; the metric, its interval and
    the worst category are named. 2: wrong input, e.g. a file that does not exist. The run's folder RUNS/RUN_ID is
    what `evaluate` writes, with verdict.json and the trend added; history.html beside the history shows all runs. The
    same run id again continues a killed run, or says that it is done and ends with the same exit code as before.
    jobs/examples/ has a crontab, a systemd timer and a Kubernetes CronJob.
    """

    schedule: OmitArgPrefixes[ScheduleConfig]


@dataclass(frozen=True, kw_only=True)
class SubmitJob:
    """Submit a command to a Ray cluster, show its log, end with its exit code. For cron, systemd and CI.

        distributed-rerank submit --address http://127.0.0.1:8265 --submission-id evaluation-2026-11-23 \\
            --working-dir . -- python jobs/scheduled_evaluation.py --catalogue s3://bucket/df.csv ...

    `ray job submit` ends with 0 for a job that was stopped and with 1 for any failure. This ends with 0 where the job
    succeeded, with the job's own exit code where it failed (2 bad input, 3 regression, 75 outage), with 130 where it
    was stopped. An id that runs, succeeded or found a regression is not submitted again: its log is shown and its exit
    code returned, so a timer that fires twice does the work once. One that crashed or was stopped is, as ID.2, ID.3 and
    so on, and continues. Interrupting this command does not stop the job. A token is taken from the environment as Ray
    does: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """

    command: Positional[tuple[str, ...]]
    """What to run on the cluster, after `--`."""
    submission_id: str
    """Unique on the cluster; the same id again attaches to the job that has it, or starts it again if it crashed."""
    address: str = "http://127.0.0.1:8265"
    """Address of the cluster's dashboard."""
    working_dir: str | None = None
    """Folder to upload and to run in, without what .gitignore and .rayignore name. Default: the cluster's own."""
    driver_cpus: float | None = None
    """Run the command itself on a worker, with so many CPUs. Default: on the head, without any."""
    driver_gpus: float | None = None
    """Run the command itself on a worker, with so many GPUs: for `--num-workers 0`, which computes in that process."""
    env: tuple[str, ...] = ()
    """Environment variables of the job, as NAME=VALUE. Everybody who sees the dashboard sees them: no secrets."""

    def __post_init__(self) -> None:
        check_numbers(self, "driver_cpus driver_gpus", least=0)
        for word in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*=.*", word, re.DOTALL):
                raise BadInput(f"--env {word} must have the form NAME=VALUE")


@dataclass(frozen=True, kw_only=True)
class DemoJob(OutJob):
    """The whole path on a generated catalogue, on local Ray: under 2 minutes on 2 cores, no network, no weights.

        distributed-rerank demo --out out/demo

    120 product designs in look-alike families, 6 photos each, labels of `train` and `validation` disjoint. A small
    network (timm's test_resnet, untrained) is first trained as extractor on half of the train labels; then a pairwise
    model on Ray Train on the other half, with a chain chosen on labels that it was not trained on; then the validation
    labels, which nothing has seen, are evaluated before and after re-ranking. The figures are what came out: if
    re-ranking did not help, it says so.
    """


@dataclass(frozen=True, kw_only=True)
class MakeCatalogueJob:
    """Folder of photos, or a data set's archive -> catalogue with a split in which no label is in both parts.

        distributed-rerank catalogue photos --out runs/photos.csv

    Reads one folder a label, open-metric-learning's df.csv, Hugging Face's imagefolder (metadata.csv or
    metadata.jsonl), COCO and CVAT boxes, exports of FiftyOne, and the extracted archives of SOP, In-shop, CUB-200,
    Cars-196 and Market-1501 with the rules of their protocols. Photos that cannot be opened are left out and named.
    The table is checked as `train` and `evaluate` check it.
    """

    folder: Positional[Path]
    """Folder of the photos."""
    out: Path
    """Table to write, .csv or .parquet."""
    overwrite: bool = False
    """Replace a table that is there with other rows."""
    importing: OmitArgPrefixes[ImportConfig] = field(default_factory=ImportConfig)


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Model folder -> ONNX files of encoder and head, with 64 pairs whose logits are known.

        distributed-rerank export --model runs/model --out runs/onnx

    encoder.onnx turns pixels into the encoding of an image, head.onnx two encodings and a first-stage distance into a
    logit; the first axis is free, opset 18, float32. export.json says how a picture becomes pixels. The files are
    compared with the model by onnxruntime before they are kept. Needs pip install 'distributed-rerank[onnx]'.
    """

    model: str
    """Folder that `train` wrote, or hf-hub:owner/name with --allow-hub."""
    allow_hub: bool = False
    """Fetch --model hf-hub:owner/name from the Hugging Face hub."""
    out: Path
    """Folder for the files."""


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """Does an export still give the logits that were stored with it? Exit code 2 where it does not.

    distributed-rerank verify --folder runs/onnx
    """

    folder: Path
    """Folder that `export` wrote."""


@dataclass(frozen=True, kw_only=True)
class ServeJob(ClusterJob):
    """Answer re-ranking requests over HTTP, on Ray Serve.

        distributed-rerank serve runs/model --catalogue photos.csv --cache runs/cache
        curl http://127.0.0.1:8000/rerank -H 'Content-Type: application/json' \\
            -d '{"query": "a.jpg", "documents": ["b.jpg", "c.jpg"], "top_n": 1}'

    A query or document is an id of the catalogue, or an image: {"image": BASE64} or a data: URL. Addresses and paths
    are never opened. `distances` may give those of the first stage. The answer has `results`, best first, with `index`
    and `relevance_score` (probability of a match) as `Reranker.rank` gives them. GET /health tells whether a replica
    is ready. What is refused gets a status of 4xx and one line. A replica that dies loses no request. Ctrl-C answers
    what is under way, then ends. Needs pip install 'distributed-rerank[serve]', except with --num-workers 0.
    """

    model: Positional[str]
    """Folder that `train` wrote, or hf-hub:owner/name with --allow-hub."""
    allow_hub: bool = False
    """Fetch hf-hub:owner/name from the Hugging Face hub."""
    chain: Literal["model", "replace"] | Path = "model"
    """model: the model folder's chain.json; replace: by the logit alone; or a chain.json."""
    top_n: int | None = None
    """Documents of each query that the model looks at. Default: as the chain says, else 10."""
    catalogue: str | None = None
    """CSV or Parquet table of the images that requests name by id. Those that --cache lacks are encoded first."""
    image_root: tuple[str, ...] = ()
    """Folders and buckets (s3://NAME) that all images must lie in. Default: those that the table names."""
    cache: Path | None = None
    """Folder of the encodings, on this machine (on a cluster: one that all its nodes mount); the next start goes on
    with it."""
    cache_gb: float = 1.0
    """Most GB of the cache."""
    serving: OmitArgPrefixes[ServeConfig] = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        check_numbers(self, "top_n", least=1)
        check_numbers(self, "cache_gb", above=0)


@dataclass(frozen=True, kw_only=True)
class CompareJob(QueriesJob):
    """Finished evaluations and other systems' runs side by side: which differences are real?

        distributed-rerank compare runs/token runs/concat theirs.trec --catalogue photos/df.csv --out runs/comparison

    Each is a folder of `evaluate` (other models, seeds, top_n) or candidate lists of another system (TREC run, CSV,
    Parquet) of the same queries and gallery. Every two are compared query by query by mAP@10 and CMC@1: mean
    difference, its 95 % interval and p-value by label, and the p-value corrected for the number of comparisons (Holm).
    The table is written as comparison.md, .tex, .html and .json. Other catalogues, queries or labels are refused;
    --missing-lists says what becomes of queries that a file has no list for.
    """

    results: Positional[tuple[Path, ...]]
    """Folders of `evaluate`, and files with lists; the first is compared with all others, and so on."""
    out: Path
    """Folder for the table."""
    catalogue: str | None = None
    """CSV or Parquet table that was evaluated; needed for files with lists."""
    missing_lists: MissingLists | None = None
    """Queries that a file has no list for: error: refused; miss: the file finds nothing for them; leave_out: no result
    counts them. Default: error."""
    seed: int = 0
    """Seed of the resampling behind intervals and p-values."""
    overwrite: bool = False
    """Recompute a folder that another comparison made."""

    def __post_init__(self) -> None:
        check_numbers(self, "seed", least=0)


JOBS: Mapping[str, type] = {
    "catalogue": MakeCatalogueJob,
    "embed": EmbedJob,
    "train": TrainJob,
    "train-extractor": TrainExtractorJob,
    "evaluate": EvaluateJob,
    "rerank": RerankJob,
    "compare": CompareJob,
    "serve": ServeJob,
    "export": ExportJob,
    "verify": VerifyJob,
    "scheduled-evaluation": ScheduledEvaluationJob,
    "submit": SubmitJob,
    "demo": DemoJob,
}
"""By the name of the command."""
