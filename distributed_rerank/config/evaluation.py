"""Where candidates come from, what re-orders them, and how the outcome is measured."""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from distributed_rerank.config.choices import DistanceKind, MissingLists, UnscoredPairs
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.own import load_function
from distributed_rerank.errors import BadInput, check_numbers


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig:
    """The candidates that are re-ranked: a search over embeddings, or the lists of another system."""

    extractor: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)
    embeddings: Path | None = None
    """Embeddings made earlier: a folder of `embed`, or Parquet with id and embedding. Images then stay closed."""
    candidates: Path | None = None
    """Candidate lists of any system: Parquet or CSV (query_id, gallery_id, distance or score), or a TREC run."""
    distances: DistanceKind | None = None
    """What the distances or scores of --candidates are; cosine and inner_product are similarities (large = same).
    Default: guessed from the column and its range. They become the L2 distances that models are trained on, if need be
    computed from --embeddings."""
    missing_lists: MissingLists | None = None
    """Queries that --candidates has no list for: error: refused; miss: they find nothing; leave_out: they are no
    queries. Default: error; miss in `rerank` without --query-catalogue, where every image may be a query."""
    n_items: int = 100
    """Items that the search retrieves for each query."""
    search: Literal["exact", "approximate"] = "exact"
    """approximate: a query is compared with the part of the gallery that it is near to, as large as --min-recall needs;
    quicker from 10^6 images and 10^5 queries on. What it misses is measured against exact search and told. Needs
    faiss."""
    min_recall: float = 0.95
    """Share of the nearest items that approximate search must find, on a sample of the queries."""

    def __post_init__(self) -> None:
        if self.n_items < 1:
            raise BadInput(f"n_items={self.n_items} must be at least 1")
        if not 0 < self.min_recall <= 1:
            raise BadInput(f"min_recall={self.min_recall} is no share of the nearest items; give above 0, up to 1")
        if self.search == "approximate" and importlib.util.find_spec("faiss") is None:
            raise BadInput(
                "--search approximate needs faiss: pip install 'distributed-rerank[approximate]', or leave it out"
            )

    @property
    def recall(self) -> float | None:
        """`min_recall` where the search is approximate; None: it is exact."""
        return self.min_recall if self.search == "approximate" else None

    def without_effect(self) -> dict[str, str]:
        """Settings that these settings make meaningless, and what would give them a meaning."""
        names = {} if self.candidates is not None else dict.fromkeys(("missing_lists", "distances"), "--candidates")
        return names | ({"min_recall": "--search approximate"} if self.search == "exact" else {})

    def check_files(self) -> None:
        """Raises BadInput where nothing to search with is named, and for files that do not exist."""
        if self.extractor.name is None and self.embeddings is None and self.candidates is None:
            raise BadInput("nothing to search with: give --extractor, --embeddings or --candidates")
        for name in ("embeddings", "candidates"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise BadInput(f"--{name} {path} does not exist; check the path")
        if self.extractor.name is not None:
            self.extractor.check_files()


@dataclass(frozen=True, kw_only=True)
class RerankerConfig:
    """The pairwise model and the chain that turns its logits into an order."""

    model: str | None = None
    """Folder that `train` wrote, or hf-hub:owner/name with --allow-hub. Default: the first stage alone."""
    allow_hub: bool = False
    """Fetch --model hf-hub:owner/name from the Hugging Face hub."""
    chain: Literal["model", "replace", "first_stage"] | Path = "model"
    """model: the model folder's chain.json; replace: by the logit alone; first_stage: nothing; or a chain.json."""
    top_n: int | None = None
    """Candidates of each query that are re-ranked. Default: as the chain says, else 10."""

    def __post_init__(self) -> None:
        check_numbers(self, "top_n", least=1)

    def check_hub(self) -> None:
        """Raises BadInput for a model on the hub that nobody has allowed to fetch."""
        if self.model is not None and self.model.startswith("hf-hub:") and not self.allow_hub:
            raise BadInput(f"--model {self.model} is fetched from the network; allow it with --allow-hub")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How rankings are measured."""

    ks: tuple[int, ...] = (1, 5, 10)
    """Cut-offs of the metrics."""
    own_metrics: tuple[str, ...] = ()
    """Metrics of your own as package.module:function, measured beside the others under the function's name."""
    resampling_seed: Annotated[int, arg(name="seed")] = 0
    """Seed of the resampling behind intervals and p-values."""
    baselines: bool = True
    """Measure free steps as well: k-reciprocal re-ranking, query expansion, database augmentation."""
    external: Path | None = None
    """Another system's scores of pairs, measured as a row of its own on the first stage's candidates: Parquet or CSV
    (query_id, gallery_id, score or distance), or a TREC run."""
    unscored: UnscoredPairs = "behind"
    """Candidates that --external has no score of: behind: they stay behind those that have one; error: refused."""
    fmrs: tuple[float, ...] = ()
    """False match rates, such as 0.1, at which OML's fnmr@fmr of the first stage is measured; needs embeddings."""
    pcf_variances: tuple[float, ...] = (0.5,)
    """Shares of variance for OML's pcf, the share of axes that the embeddings need for it."""
    price_per_worker_hour: float | None = None
    """Price of an hour of one worker, in any currency; the report then tells the price of 1,000 queries."""

    def __post_init__(self) -> None:
        check_numbers(self, "resampling_seed", least=0)
        if not self.ks or min(self.ks) < 1:
            raise BadInput(f"ks={list(self.ks)} must be one or more cut-offs of at least 1; give e.g. --ks 1 5 10")
        if self.external is not None and not self.external.exists():
            raise BadInput(f"--external {self.external} does not exist; check the path")
        for name in self.own_metrics:
            load_function(name, "--own-metrics")
        for name in ("fmrs", "pcf_variances"):
            if any(not 0 <= value <= 1 for value in getattr(self, name)):
                raise BadInput(f"{name}={list(getattr(self, name))} must lie between 0 and 1")
        if self.price_per_worker_hour is not None and not 0 <= self.price_per_worker_hour < math.inf:
            raise BadInput(f"price_per_worker_hour={self.price_per_worker_hour} must be at least 0 and finite")

    def without_effect(self) -> dict[str, str]:
        """Settings that these settings make meaningless, and what would give them a meaning."""
        has_none = {"unscored": (self.external is None, "--external"), "external": (not self.baselines, "--baselines")}
        return {name: fix for name, (is_void, fix) in has_none.items() if is_void}
