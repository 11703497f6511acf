"""Fields that the command lines of several jobs share, beside those of `command_line`. Layer 4."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from distributed_rerank.chain.chain import Chain
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.reranking.run import load_model_and_chain


@dataclass(frozen=True, kw_only=True)
class RerankerArguments:
    """What re-orders the candidates."""

    model: str | None = None
    """Folder that jobs/train.py wrote, or hf-hub:owner/name. Default: the first stage alone."""
    chain: Literal["model", "replace", "first_stage"] | Path = "model"
    """model: the model folder's chain.json; replace: by the logit alone; first_stage: nothing; or a chain.json."""
    top_n: int | None = None
    """Candidates of each query that are re-ranked. Default: as the chain says, else 10."""

    def load(self) -> tuple[PairwiseModel | None, Chain]:
        """The model, if any, and the chain. Raises BadInput as `load_model_and_chain` does."""
        return load_model_and_chain(self.model, self.chain, self.top_n)


@dataclass(frozen=True, kw_only=True)
class RequiredRerankerArguments(RerankerArguments):
    """The same where nothing can be done without a model."""

    model: str = field()
    """Folder that jobs/train.py wrote, or hf-hub:owner/name."""


@dataclass(frozen=True, kw_only=True)
class MeasureArguments:
    """How rankings are measured; the fields are those of an EvaluationConfig."""

    ks: tuple[int, ...] = (1, 5, 10)
    """Cut-offs of the metrics."""
    seed: int = 0
    """Of the resampling behind intervals and p-values."""
    max_rejects: float = 0.001
    """Share of the images that may be unreadable before the job fails."""
    baselines: bool = True
    """Measure what needs no training as well: k-reciprocal re-ranking, query expansion, database augmentation."""
    price_per_worker_hour: float | None = None
    """What an hour of one worker costs, in any currency; the report then tells the price of 1,000 queries."""

    def settings(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
