"""What is evaluated, how it is measured, and which of that decides the result. Layer 3."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data import artifacts
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import ExtractionConfig
from distributed_rerank.retrieval import RetrievalConfig
from distributed_rerank.scoring.score import ScoringConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated and how it is measured."""

    extraction: ExtractionConfig | None = None
    """How to embed the catalogue; None where `embeddings` or `candidates` are given."""
    embeddings: Path | None = None
    """Embeddings made earlier; the image files are then opened only by a pairwise model."""
    candidates: Path | None = None
    """The first stage's lists, from any system; None = exact search over the embeddings."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    ks: tuple[int, ...] = (1, 5, 10)
    seed: int = 0
    """Of the resampling behind intervals and p-values."""
    max_rejects: float = 0.001
    baselines: bool = True
    """Measure what needs no training as well: k-reciprocal re-ranking, query expansion, database augmentation."""
    price_per_worker_hour: float | None = None
    """What an hour of one worker costs, in any currency; the report then has a column for it."""

    def __post_init__(self) -> None:
        if self.extraction is None and self.embeddings is None and self.candidates is None:
            raise BadInput("nothing to search with: give --extractor, --embeddings or --candidates")
        if not self.ks or min(self.ks) < 1:
            raise BadInput(f"ks={list(self.ks)} must be one or more cut-offs of at least 1; give e.g. --ks 1 5 10")
        if self.price_per_worker_hour is not None and not 0 <= self.price_per_worker_hour < math.inf:
            raise BadInput(f"price_per_worker_hour={self.price_per_worker_hour} must be at least 0 and finite")
        if not 0 <= self.max_rejects <= 1:
            raise BadInput(f"max_rejects={self.max_rejects} is no share of the images; give 0 to 1")


def check_depth(config: EvaluationConfig, chain: Chain) -> None:
    """Raises BadInput where the chain re-ranks more candidates than are searched for; given lists may be shorter."""
    if config.candidates is None and chain.pairwise is not None and chain.pairwise.top_n > config.retrieval.n_items:
        raise BadInput(
            f"top_n={chain.pairwise.top_n} exceeds the {config.retrieval.n_items} retrieved items per query; "
            "raise --n-items or lower --top-n"
        )


def settings_of(config: EvaluationConfig) -> dict[str, Any]:
    """The part of the config that decides results: not where files lie, nor memory, threads, limits."""
    settings = {
        name: value for name, value in asdict(config).items() if name not in ("embeddings", "candidates", "max_rejects")
    }
    extraction = None if config.extraction is None else config.extraction.fingerprint_settings()
    return settings | {
        "retrieval": config.retrieval.fingerprint_settings(),
        "scoring": config.scoring.fingerprint_settings(),
        "extraction": extraction,
    }


def input_digests(config: EvaluationConfig) -> dict[str, str | None]:
    """Digests of the embeddings and candidates that were given."""
    paths = {"embeddings": config.embeddings, "candidates": config.candidates}
    return {name: None if path is None else _digest_of_input(path) for name, path in paths.items()}


def _digest_of_input(path: Path) -> str:
    if not path.exists():
        raise BadInput(f"{path} does not exist; check the path")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return artifacts.json_digest([artifacts.file_digest(file) for file in files])
