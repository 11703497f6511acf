"""How work is cut into pieces, and what a worker may use for it."""

from dataclasses import dataclass
from typing import Any

from distributed_rerank.errors import BadInput, check_numbers

COUNTS = (
    "images_per_block",
    "images_per_batch",
    "queries_per_block",
    "tile_size",
    "pairs_per_batch",
    "encode_batch",
    "blocks_per_call",
    "threads_per_worker",
    "decode_threads",
)


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """Sizes of blocks and batches, threads, memory and limits. Blocks and batches can change last bits of results."""

    images_per_block: int = 256
    """Images embedded as one unit of work; a killed run repeats unfinished units only."""
    images_per_batch: int | None = None
    """Images in one call of the extractor. Default: 8 on a CPU, where small batches stay in the cache; 256 on a GPU."""
    queries_per_block: int | None = None
    """Queries searched for, or scored, as one unit of work. Default: 1,024 in search (8,192 in an approximate one), a
    few seconds of scoring."""
    tile_size: int = 65_536
    """Gallery items that a block of queries is compared with at a time. It changes no bit."""
    pairs_per_batch: int | None = None
    """Pairs in one call of the pairwise model. Default: from the cost of a pair."""
    encode_batch: int = 16
    """Images in one call of the pairwise model's encoder."""
    blocks_per_call: int | None = None
    """Score blocks that a worker gets at a time; changes no bit. Default: 1, or 64 on a GPU."""
    encoding_gb: float = 2.0
    """Memory for encodings in GB; images beyond it are encoded in several rounds. It changes no bit."""
    threads_per_worker: int = 1
    """Parts that a worker computes at once, one thread each; changes no bit. Give --cpus-per-worker as many."""
    decode_threads: int | None = None
    """Threads that decode images in each process; changes no bit. Default: 1, or 16 beside a GPU. Slow storage is read
    by more threads, as many as it needs."""
    max_rejects: float | None = None
    """Share of the images that may be unreadable, 0 to 1, before the job fails. Default: 1 %, and five in any case."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name}={value} must be at least 1")
        if self.encoding_gb <= 0:
            raise BadInput(f"encoding_gb={self.encoding_gb} must be above 0")
        check_numbers(self, "encoding_gb")
        if self.max_rejects is not None and not 0 <= self.max_rejects <= 1:
            raise BadInput(f"max_rejects={self.max_rejects} is no share of the images; give 0 to 1")

    @property
    def queries_per_search_block(self) -> int:
        """`queries_per_block` of a search, its default written out."""
        return self.queries_per_block or 1024

    def score_blocks_per_call(self, is_gpu: bool) -> int:
        """`blocks_per_call`, its default written out."""
        return self.blocks_per_call or (64 if is_gpu else 1)

    def decode_threads_for(self, is_gpu: bool) -> int:
        """`decode_threads`, its default written out."""
        return self.decode_threads or (16 if is_gpu else 1)

    def fingerprint_settings(self, stage: str) -> dict[str, Any]:
        """The settings that can change a result of `stage` (embed, retrieve or score), or its unfinished blocks."""
        deciding = {
            "embed": ("images_per_block", "images_per_batch"),
            "retrieve": ("queries_per_search_block",),
            "score": ("queries_per_block", "pairs_per_batch", "encode_batch"),
        }
        return {name: getattr(self, name) for name in deciding[stage]}
