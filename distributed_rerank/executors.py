"""Who does the work that many devices can share: this process where none is given, else the workers of a cluster."""

from typing import Protocol, runtime_checkable

from distributed_rerank.extraction import EmbedExecutors
from distributed_rerank.retrieval import SearchExecutors
from distributed_rerank.scoring.rounds import ScoreExecutors


@runtime_checkable
class Executors(EmbedExecutors, SearchExecutors, ScoreExecutors, Protocol):
    """Compute embeddings, candidate lists and logits; a job holds one object for all of its stages."""
