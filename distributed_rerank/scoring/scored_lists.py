"""Candidate lists with the logits of their pairs: what scoring gives and a chain orders."""

from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor

from distributed_rerank.data.rejects import Reject
from distributed_rerank.tensors.candidate_lists import CandidateLists

_QUERIES_PER_PART = 1 << 12


@dataclass(frozen=True)
class ScoredLists:
    """Candidate lists with the logits of their first candidates."""

    lists: CandidateLists
    logits: Float32[Tensor, "query top_n"] | None = None
    """Larger = more different; NaN where a list is shorter or an image could not be read, and such a candidate counts
    as removed: callers drop it, they do not rank it. None: no pair was scored."""
    rejects: tuple[Reject, ...] = ()
    n_images: int = 0
    """Distinct images of the scored part. Unlike the counts of the manifest it is the same for a continued run."""

    @property
    def n_pairs(self) -> int:
        """Pairs that have a logit."""
        # Some queries at a time: torch would make an int64 of each pair to sum them.
        parts = () if self.logits is None else self.logits.split(_QUERIES_PER_PART)
        return sum(int(part.isfinite().sum()) for part in parts)
