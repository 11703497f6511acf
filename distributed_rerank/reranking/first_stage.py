"""The first stage: the readable part of a catalogue and the candidate lists of its queries."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_rerank import extraction, retrieval
from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.evaluation import FirstStageConfig, MissingLists
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import artifacts, tables
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.distance_kinds import Conversion
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.data.rejects import Reject
from distributed_rerank.data.trained_on import are_normalised
from distributed_rerank.errors import BadInput
from distributed_rerank.executors import Executors
from distributed_rerank.reranking.external_candidates import external_candidates, settle_missing_lists
from distributed_rerank.reranking.known_distances import (
    KnownDistances,
    check_embeddings,
    extractor_settings,
    settle_distances,
)
from distributed_rerank.runtime.progress import timed
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.pair_values import PairValues


@dataclass(frozen=True)
class FirstStage:
    """The catalogue without its unreadable images, and the candidate lists of its queries."""

    catalogue: Catalogue
    lists: CandidateLists
    embeddings: Embeddings | None
    rejects: list[Reject]
    are_given: bool = False
    """Whether the lists come from another system and not from the search here."""
    n_without_list: int = 0
    """Queries that the lists of another system do not name; see `settle_missing_lists`."""


def first_stage(
    catalogue: Catalogue,
    config: FirstStageConfig,
    work: WorkConfig,
    folder: Path,
    executors: Executors | None,
    timings: dict[str, float],
    missing_lists: MissingLists = "error",
    known: KnownDistances | None = None,
) -> FirstStage:
    """The readable part of the catalogue and the candidate lists of its queries, with L2 distances.

    `missing_lists` is what becomes of queries without one in `config.candidates`, where the config does not say so;
    `known` says what the model expects of the distances. Raises BadInput for embeddings and distances that are others.
    """
    known = known or KnownDistances()
    embeddings, n_without_list = None, 0
    with timed(timings, "embed"):
        if config.embeddings is not None:
            embeddings = extraction.check_complete(
                read_embeddings(config.embeddings), catalogue, work.max_rejects, config.embeddings
            )
        elif config.extractor.name is not None:
            embeddings = extraction.embed(
                catalogue, config.extractor, folder / "embeddings", work=work, executors=executors
            )
    readable, rejects = catalogue, []
    if embeddings is not None:
        if config.embeddings is not None:
            check_embeddings(known, embeddings, extractor_settings(config.embeddings), "--embeddings")
        else:
            settings = extraction.embedding_settings(config.extractor, work)["extractor"]
            check_embeddings(known, embeddings, json.loads(json.dumps(settings)), "--extractor")
        has_row = embeddings.rows_of(catalogue.ids) >= 0
        readable = catalogue if has_row.all() else catalogue.take(np.flatnonzero(has_row))
        rejects = embeddings.rejects_among(catalogue.ids)
    with timed(timings, "retrieve"):
        if config.candidates is not None:
            # Where only their order matters, the numbers may be anything.
            conversion = None
            if known.are_used or config.distances is not None:
                is_unit = known.is_unit if embeddings is None else are_normalised(embeddings.blocks())
                conversion = Conversion(config.distances, is_unit)
            ignored = {reject.id for reject in rejects}
            lists = external_candidates(readable, config.candidates, ignored, conversion)
            if conversion is not None:
                lists, is_new = settle_distances(lists, conversion, known, readable, embeddings, config)
                if is_new:
                    write_lists(lists, readable, folder / "candidates")
            missing = config.missing_lists or missing_lists
            readable, n_without_list = settle_missing_lists(readable, lists, missing, config.candidates)
        else:
            assert embeddings is not None, "a search needs embeddings"
            lists = retrieval.retrieve(
                readable, embeddings, config.n_items, folder / "candidates", work=work, executors=executors
            )
    lists = without_junk(lists, readable)
    return FirstStage(readable, lists, embeddings, rejects, config.candidates is not None, n_without_list)


def judged_pairs(catalogue: Catalogue) -> PairValues | None:
    """The grades of the catalogue's judgements by pairs of items."""
    if catalogue.judgements is None:
        return None
    queries, candidates, grades = map(torch.from_numpy, map(np.array, catalogue.judgements.pairs(catalogue.ids)))
    keys, order = (queries * len(catalogue) + candidates).sort()
    return PairValues(keys, grades[order], len(catalogue))


def without_junk(lists: CandidateLists, catalogue: Catalogue) -> CandidateLists:
    """The lists without candidates that are judged to count as neither relevant nor not (a grade below 0)."""
    judged = judged_pairs(catalogue)
    if judged is None or not bool((judged.values < 0).any()):
        return lists
    return lists.without(judged.look_up(lists.query_items[:, None].expand_as(lists.items), lists.items) < 0)[0]


def write_lists(lists: CandidateLists, catalogue: Catalogue, folder: Path) -> None:
    """Write candidates.parquet into the folder."""
    folder.mkdir(exist_ok=True)
    tables.write_table(folder / "candidates.parquet", candidates_table(lists, catalogue.ids), "candidates")


def check_depth(config: FirstStageConfig, chain: Chain) -> None:
    """Raise BadInput if the chain re-ranks more candidates than are searched for; given lists may be shorter."""
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
    settings |= {"missing_lists": "leave_out"} if config.missing_lists == "leave_out" else {}
    return settings | ({} if config.candidates is None else {"distances": config.distances})


def input_digests(config: FirstStageConfig) -> dict[str, str | None]:
    """Digests of the embeddings and candidates that were given."""
    paths = {"embeddings": config.embeddings, "candidates": config.candidates}
    return {name: None if path is None else _digest_of_input(path) for name, path in paths.items()}


def _digest_of_input(path: Path) -> str:
    if not path.exists():
        raise BadInput(f"{path} does not exist; check the path")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return artifacts.json_digest([artifacts.file_digest(file) for file in files])
