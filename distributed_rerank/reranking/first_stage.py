"""The first stage: the readable part of a catalogue and the candidate lists of its queries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_rerank import extraction, retrieval
from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.evaluation import FirstStageConfig, MissingLists
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import artifacts
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.data.rejects import Reject, check_rejects
from distributed_rerank.errors import BadInput
from distributed_rerank.executors import Executors
from distributed_rerank.reranking.external_candidates import external_candidates, settle_missing_lists
from distributed_rerank.runtime.progress import timed


@dataclass(frozen=True)
class FirstStage:
    """The catalogue without its unreadable images, and the candidate lists of its queries."""

    catalogue: Catalogue
    lists: CandidateLists
    embeddings: Embeddings | None
    rejects: list[Reject]
    n_without_list: int = 0
    """Queries that the lists of another system do not name; see `settle_missing_lists`."""


def first_stage(
    catalogue: Catalogue,
    config: FirstStageConfig,
    work: WorkConfig,
    folder: Path,
    executors: Executors,
    timings: dict[str, float],
    missing_lists: MissingLists = "error",
) -> FirstStage:
    """The readable part of the catalogue and the candidate lists of its queries.

    `missing_lists` is what becomes of queries without one in `config.candidates`, where the config does not say so.
    """
    readable, embeddings, n_without_list = catalogue, None, 0
    with timed(timings, "embed"):
        if config.embeddings is not None:
            readable, embeddings = read_for(catalogue, config.embeddings, work.max_rejects)
        elif config.extractor.name is not None:
            readable, embeddings = embed_readable(
                catalogue, config.extractor, work, folder / "embeddings", executors.extract
            )
    own = set(catalogue.ids)
    rejects = [] if embeddings is None else [reject for reject in embeddings.rejects if reject.id in own]
    with timed(timings, "retrieve"):
        if config.candidates is not None:
            lists = external_candidates(readable, config.candidates, {reject.id for reject in rejects})
            missing = config.missing_lists or missing_lists
            readable, n_without_list = settle_missing_lists(readable, lists, missing, config.candidates)
        else:
            assert embeddings is not None, "a search needs embeddings"
            lists = retrieval.retrieve(
                readable, embeddings, config.n_items, folder / "candidates", work=work, search=executors.search
            )
    return FirstStage(readable, lists, embeddings, rejects, n_without_list)


def embed_readable(
    catalogue: Catalogue, config: ExtractorConfig, work: WorkConfig, out: Path, extract: extraction.Extract
) -> tuple[Catalogue, Embeddings]:
    """Embeddings of the catalogue, and the catalogue without the images that cannot be read."""
    embeddings = extraction.embed(catalogue, config, out, work=work, extract=extract)
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


def check_depth(config: FirstStageConfig, chain: Chain) -> None:
    """Raises BadInput where the chain re-ranks more candidates than are searched for; given lists may be shorter."""
    if config.candidates is None and chain.pairwise is not None and chain.pairwise.top_n > config.n_items:
        raise BadInput(
            f"top_n={chain.pairwise.top_n} exceeds the {config.n_items} retrieved items per query; "
            "raise --n-items or lower --top-n"
        )


def first_stage_settings(config: FirstStageConfig, work: WorkConfig) -> dict[str, Any]:
    """All settings that can change the candidate lists: not where files lie, nor memory, threads, limits."""
    settings = {
        "extraction": None if config.extractor.name is None else extraction.embedding_settings(config.extractor, work),
        "retrieval": retrieval.retrieval_settings(config.n_items, work),
    }
    # "error" and "miss" give the same result wherever both give one.
    return settings | ({"missing_lists": "leave_out"} if config.missing_lists == "leave_out" else {})


def input_digests(config: FirstStageConfig) -> dict[str, str | None]:
    """Digests of the embeddings and candidates that were given."""
    paths = {"embeddings": config.embeddings, "candidates": config.candidates}
    return {name: None if path is None else _digest_of_input(path) for name, path in paths.items()}


def _digest_of_input(path: Path) -> str:
    if not path.exists():
        raise BadInput(f"{path} does not exist; check the path")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return artifacts.json_digest([artifacts.file_digest(file) for file in files])
