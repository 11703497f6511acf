"""Re-ranking for image retrieval: train a pairwise model on hard pairs, re-order the first `top_n` neighbours of
every query, and say with honest figures whether that was worth it. One process or a Ray cluster, the same code and
the same bits.

    from distributed_rerank import ExtractorConfig, FirstStageConfig, evaluate, read_catalogue

Names are imported when they are used: `import distributed_rerank` itself loads neither torch nor timm nor ray.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig, RerankerConfig
    from distributed_rerank.config.extractor import ExtractorConfig
    from distributed_rerank.config.pairwise import (
        ConcatSiameseConfig,
        DistanceSiameseConfig,
        SplitSiameseConfig,
        TokenSiameseConfig,
    )
    from distributed_rerank.config.training import TrainingConfig
    from distributed_rerank.config.work import WorkConfig
    from distributed_rerank.data.catalogue_files import read_catalogue
    from distributed_rerank.errors import BadInput
    from distributed_rerank.evaluation.run import evaluate
    from distributed_rerank.extraction import embed
    from distributed_rerank.models.saving import load_model
    from distributed_rerank.online.reranker import Reranker
    from distributed_rerank.reranking.loading import load_model_and_chain
    from distributed_rerank.reranking.rerank import rerank
    from distributed_rerank.training.stage import train

# Arrow's own allocator keeps what its threads have freed, some 0.1 GB; the system's gives it back. Arrow looks at this
# when it is imported, in a job after this.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"

_MODULES = {
    "BadInput": "errors",
    "ConcatSiameseConfig": "config.pairwise",
    "DistanceSiameseConfig": "config.pairwise",
    "ExtractorConfig": "config.extractor",
    "FirstStageConfig": "config.evaluation",
    "MeasureConfig": "config.evaluation",
    "Reranker": "online.reranker",
    "RerankerConfig": "config.evaluation",
    "SplitSiameseConfig": "config.pairwise",
    "TokenSiameseConfig": "config.pairwise",
    "TrainingConfig": "config.training",
    "WorkConfig": "config.work",
    "embed": "extraction",
    "evaluate": "evaluation.run",
    "load_model": "models.saving",
    "load_model_and_chain": "reranking.loading",
    "read_catalogue": "data.catalogue_files",
    "rerank": "reranking.rerank",
    "train": "training.stage",
}

__all__ = [
    "BadInput",
    "ConcatSiameseConfig",
    "DistanceSiameseConfig",
    "ExtractorConfig",
    "FirstStageConfig",
    "MeasureConfig",
    "Reranker",
    "RerankerConfig",
    "SplitSiameseConfig",
    "TokenSiameseConfig",
    "TrainingConfig",
    "WorkConfig",
    "embed",
    "evaluate",
    "load_model",
    "load_model_and_chain",
    "read_catalogue",
    "rerank",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the module that has `name` when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
