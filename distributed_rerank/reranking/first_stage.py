"""The first stage: the readable part of a catalogue and the candidate lists of its queries."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_rerank import extraction, retrieval
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.data.rejects import Reject, check_rejects
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import ExtractionConfig
from distributed_rerank.reranking.config import EvaluationConfig
from distributed_rerank.reranking.external_candidates import external_candidates
from distributed_rerank.runtime.progress import timed
from distributed_rerank.scoring import score as scoring


@dataclass(frozen=True)
class Executors:
    """Who does the work that many devices can share; by default this process."""

    extract: extraction.Extract = extraction.extract
    search: retrieval.Search = retrieval.search
    score: scoring.Score = scoring.score


@dataclass(frozen=True)
class FirstStage:
    """The catalogue without its unreadable images, and the candidate lists of its queries."""

    catalogue: Catalogue
    lists: CandidateLists
    embeddings: Embeddings | None
    rejects: list[Reject]


def first_stage(
    catalogue: Catalogue, config: EvaluationConfig, folder: Path, steps: Executors, timings: dict[str, float]
) -> FirstStage:
    """The readable part of the catalogue and the candidate lists of its queries."""
    readable, embeddings = catalogue, None
    with timed(timings, "embed"):
        if config.embeddings is not None:
            readable, embeddings = read_for(catalogue, config.embeddings, config.max_rejects)
        elif config.extraction is not None:
            readable, embeddings = embed_readable(
                catalogue, config.extraction, folder / "embeddings", steps, config.max_rejects
            )
    own = set(catalogue.ids)
    rejects = [] if embeddings is None else [reject for reject in embeddings.rejects if reject.id in own]
    with timed(timings, "retrieve"):
        if config.candidates is not None:
            lists = external_candidates(readable, config.candidates, {reject.id for reject in rejects})
        else:
            assert embeddings is not None, "a search needs embeddings"
            lists = retrieval.retrieve(
                readable, embeddings, config.retrieval, folder / "candidates", search=steps.search
            )
    return FirstStage(readable, lists, embeddings, rejects)


def embed_readable(
    catalogue: Catalogue, config: ExtractionConfig, out: Path, steps: Executors, max_rejects: float
) -> tuple[Catalogue, Embeddings]:
    """Embeddings of the catalogue, and the catalogue without the images that cannot be read."""
    embeddings = extraction.embed(catalogue, config, out, extract=steps.extract, max_rejects=max_rejects)
    return catalogue.take(np.flatnonzero(embeddings.rows_of(catalogue.ids) >= 0)), embeddings


def read_for(catalogue: Catalogue, folder: Path, max_rejects: float) -> tuple[Catalogue, Embeddings]:
    """Embeddings made earlier, and the catalogue without the images that they list as rejected.

    Raises BadInput for images that have neither an embedding nor a reject row, and for too many rejects.
    """
    embeddings = read_embeddings(folder)
    known = {reject.id for reject in embeddings.rejects}
    has = embeddings.rows_of(catalogue.ids) >= 0
    missing = [id for id in catalogue.ids[~has] if id not in known]
    if missing:
        raise BadInput(
            f"{len(missing)} of {len(catalogue)} images have no embedding in {folder}, first {missing[0]!r}; "
            "embed this catalogue (jobs/embed.py) or give another --embeddings"
        )
    own = set(catalogue.ids)
    rejects = [reject for reject in embeddings.rejects if reject.id in own]
    check_rejects(rejects, len(catalogue), max_rejects, str(folder / "rejects.parquet"))
    return catalogue.take(np.flatnonzero(has)), embeddings
