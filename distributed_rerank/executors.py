"""Who does the work that many devices can share: this process, or the workers of a cluster."""

from dataclasses import dataclass

from distributed_rerank import extraction, retrieval
from distributed_rerank.scoring import score as scoring


@dataclass(frozen=True)
class Executors:
    """The functions that compute embeddings, candidate lists and logits; by default in this process."""

    extract: extraction.Extract = extraction.extract
    search: retrieval.Search = retrieval.search
    score: scoring.Score = scoring.score
