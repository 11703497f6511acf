"""What a job is about to do, in one block of lines before it does it; refused where it cannot fit this machine.

Figures are estimates, and the block says what they rest on. They change no result.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_rerank.config.jobs import CatalogueJob, EmbedJob, MeasuringJob, RerankJob, TrainingJob
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput

logger = logging.getLogger(__name__)

DECODED_PER_CPU_S = 60
"""Photos of some 400 kilopixels that one CPU reads and resizes in a second."""
BYTES_OF_PROCESS = 1_400_000_000
"""Memory of a process with torch and Ray that reads one tile of embeddings at a time."""
BYTES_OF_ROW = 300
"""Memory of one row of the catalogue, with its texts, twice while it is read."""
COPIES_OF_EMBEDDINGS = 4
"""Of the matrix in a process that trains, at its peak; every other job leaves it on disk."""
ASSUMED_DIM = 1_024
BYTES_OF_CANDIDATE = 24
"""Item number, distance and logit, with one copy while they are ordered."""
SEARCHED_PER_CPU_S = 5e10
"""Products of two numbers that exact search takes in a second on one CPU."""
LONG_SEARCH_MINUTES = 10
_SHARE_OF_MEMORY = 0.9


@dataclass(frozen=True)
class Plan:
    """The extent of a job."""

    n_images: int
    n_embedded: int
    """Images that may have to be read for embeddings; 0 where these are given."""
    n_queries: int
    n_items: int
    top_n: int
    """0 where no pair is scored."""
    images_per_block: int
    queries_per_block: int
    n_workers: int | None
    """None: as many as Ray finds room for."""
    dim: int | None
    """Of the embeddings, where it is known."""
    holds_embeddings: bool = False
    """Whether the job holds all embeddings in memory."""
    n_for_pairs: int = 0
    """Images that may have to be read for pairs: queries and candidates."""
    n_searched: int = 0
    """Gallery items that each query is compared with, where an approximate search would be possible."""

    @property
    def n_pairs(self) -> int:
        """Pairs that the pairwise model scores."""
        return self.n_queries * min(self.top_n, self.n_items)

    @property
    def driver_bytes(self) -> int:
        """Memory of the driver at its peak."""
        copies = COPIES_OF_EMBEDDINGS if self.holds_embeddings else 0
        row = BYTES_OF_ROW + copies * (self.dim or ASSUMED_DIM) * 4
        lists = self.n_queries * self.n_items * BYTES_OF_CANDIDATE
        return BYTES_OF_PROCESS + self.n_images * row + lists

    @property
    def _of_embeddings(self) -> str:
        return f", {COPIES_OF_EMBEDDINGS} copies of the embeddings" if self.holds_embeddings else ""

    def lines(self, cpus: int) -> list[str]:
        """The block of lines; `cpus` are those of this machine, which count where no number of workers is given."""
        blocks = math.ceil(self.n_embedded / self.images_per_block)
        workers = (
            "as many as there is room for" if self.n_workers is None else str(self.n_workers or "none, this process")
        )
        n_cpus = self.n_workers or (1 if self.n_workers == 0 else cpus)
        # every query is read for its pairs, also where all embeddings are given
        minutes = max(self.n_embedded, min(self.n_queries, self.n_for_pairs)) / DECODED_PER_CPU_S / n_cpus / 60
        pairs = f" (top {self.top_n})" if self.top_n else ", no pairwise model"
        pairs += f", for which up to {self.n_for_pairs:,} images are read" if self.n_for_pairs else ""
        searching = self.n_queries * self.n_searched * (self.dim or ASSUMED_DIM) / SEARCHED_PER_CPU_S / n_cpus / 60
        is_long = searching >= LONG_SEARCH_MINUTES
        dim = f"{self.dim} numbers an image" if self.dim else f"{ASSUMED_DIM} numbers an image are assumed"
        embeddings = self.n_images * (self.dim or ASSUMED_DIM) * 4
        return [
            f"images      {self.n_images:,}, {self.n_embedded:,} of them to read in up to {blocks:,} blocks of "
            f"{self.images_per_block}",
            f"queries     {self.n_queries:,} with {self.n_items} candidates each, in "
            f"{math.ceil(self.n_queries / self.queries_per_block):,} blocks",
            f"pairs       {self.n_pairs:,}{pairs}",
            f"embeddings  {_bytes(embeddings)} ({dim})",
            f"workers     {workers}",
            f"minutes     at least {minutes:.1f} to read and decode ({DECODED_PER_CPU_S} images a second and CPU); the "
            "progress lines tell the rest",
            *([f"search      {searching:,.0f} minutes on CPUs; --search approximate is quicker"] if is_long else ()),
            f"memory      up to {_bytes(self.driver_bytes)} in this process ({_bytes(BYTES_OF_PROCESS)} for itself, "
            f"{BYTES_OF_ROW} bytes a row, lists{self._of_embeddings})",
        ]


def tell(job: Any, inputs: Sequence[Any]) -> None:
    """Log the plan of a job on a catalogue. Raises BadInput where it cannot fit this machine's memory."""
    catalogue = next((value for value in inputs if isinstance(value, Catalogue)), None)
    if catalogue is None or not isinstance(job, CatalogueJob):
        return
    plan = plan_of(job, catalogue)
    logger.info("plan\n  %s", "\n  ".join(plan.lines(len(os.sched_getaffinity(0)))))
    check(plan, memory_bytes())


def check(plan: Plan, memory: int) -> None:
    """Raises BadInput where the plan exceeds the memory of this machine."""
    if plan.driver_bytes > _SHARE_OF_MEMORY * memory:
        need = _bytes(plan.driver_bytes)
        raise BadInput(
            f"{plan.n_images:,} images and {plan.n_queries:,} queries need {need} in this process, the "
            f"machine has {_bytes(memory)}; start the job on a larger head, take a smaller --split, or lower --n-items"
        )


def plan_of(job: Any, catalogue: Catalogue) -> Plan:
    """The plan of a job, from its settings and the catalogue alone."""
    first = job.first_stage if isinstance(job, MeasuringJob | RerankJob) else None
    embeddings = getattr(job, "embeddings", None) if first is None else first.embeddings
    searches = first is not None or isinstance(job, TrainingJob)
    n_items = job.training.n_items if isinstance(job, TrainingJob) else first.n_items if first is not None else 0
    reads = isinstance(job, EmbedJob | TrainingJob) or (first is not None and first.extractor.name is not None)
    n_queries = len(catalogue) if isinstance(job, TrainingJob) else len(catalogue.query_items)
    top_n = _top_n(job.reranker) if isinstance(job, MeasuringJob | RerankJob) else 0
    return Plan(
        n_images=len(catalogue),
        n_embedded=len(catalogue) if reads and (first is None or embeddings is None) else 0,
        n_queries=n_queries if searches else 0,
        n_items=n_items,
        top_n=top_n,
        images_per_block=job.work.images_per_block,
        queries_per_block=job.work.queries_per_search_block,
        n_workers=job.cluster.num_workers,
        dim=None if embeddings is None else _dim(embeddings),
        holds_embeddings=isinstance(job, TrainingJob),
        n_for_pairs=min(len(catalogue), n_queries * (1 + top_n)) if top_n else 0,
        n_searched=0 if first is None or first.candidates or first.recall else catalogue.n_gallery,
    )


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def _top_n(reranker: Any) -> int:
    """Candidates of each query that are scored, as far as the settings and the model's chain tell."""
    if reranker.model is None or reranker.chain == "first_stage":
        return 0
    if reranker.top_n is not None:
        return reranker.top_n
    path = Path(reranker.model) / "chain.json"
    steps = json.loads(path.read_text(encoding="utf-8")).get("steps", []) if path.is_file() else []
    return next((step["top_n"] for step in steps if step.get("step") == "pairwise"), 10 if not path.is_file() else 0)


def _dim(embeddings: Path) -> int | None:
    """The length of an embedding, from the schema of its table alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(embeddings.glob("*.parquet")) if embeddings.is_dir() else [embeddings]
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowException):
            continue  # whoever reads the table says what is wrong with it
        if "embedding" in schema.names and pa.types.is_fixed_size_list(schema.field("embedding").type):
            return schema.field("embedding").type.list_size
    return None


def _bytes(number: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
