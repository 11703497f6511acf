"""The first stage: the readable part of a catalogue and the candidate lists of its queries."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_rerank import extraction, retrieval
from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.choices import MissingLists
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.distance_kinds import Conversion
from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.data.relevance import without_junk
from distributed_rerank.data.trained_on import are_normalised, different_setting
from distributed_rerank.errors import BadInput
from distributed_rerank.executors import Executors
from distributed_rerank.reranking.external_candidates import external_candidates, settle_missing_lists
from distributed_rerank.reranking.known_distances import (
    KnownDistances,
    check_embeddings,
    distances_of,
    extractor_settings,
    settle_distances,
)
from distributed_rerank.reranking.lists import FirstStage, is_one_against_rest, needs_joint_lists
from distributed_rerank.runtime.progress import timed
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import file_digest
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate

logger = logging.getLogger(__name__)


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
            check_same_extractor(config, work)
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
            check_embeddings(known, embeddings, settings_of_flags(config, work), "--extractor")
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
                readable, embeddings, config.n_items, folder / "candidates", recall=config.recall, work=work,
                executors=executors,
            )  # fmt: skip
    lists, are_given = without_junk(lists, readable), config.candidates is not None
    return FirstStage(readable, lists, embeddings, rejects, are_given, n_without_list, config.recall)


def settings_of_flags(config: FirstStageConfig, work: WorkConfig) -> dict[str, Any]:
    """The settings of --extractor as a manifest has them."""
    return json.loads(json.dumps(extraction.embedding_settings(config.extractor, work)["extractor"]))


def check_same_extractor(config: FirstStageConfig, work: WorkConfig) -> None:
    """Raises BadInput where --embeddings is of another extractor than --extractor, if both are given.

    Where the embeddings do not say whose they are, a warning says that they count.
    """
    if config.embeddings is None or config.extractor.name is None:
        return
    theirs = extractor_settings(config.embeddings)
    if theirs is None:
        logger.warning("--extractor is not used: --embeddings %s holds all embeddings", config.embeddings)
        return
    found = different_setting(theirs, settings_of_flags(config, work))
    if found is not None:
        setting, was, given = found
        raise BadInput(
            f"--embeddings {config.embeddings} is of another extractor than --extractor: {setting} was {was!r}, here "
            f"it is {given!r}; leave --extractor out, or give the one that these embeddings were made with"
        )


def search_adapted(
    first: FirstStage,
    chain: Chain,
    config: FirstStageConfig,
    work: WorkConfig,
    folder: Path,
    executors: Executors | None,
) -> FirstStage:
    """The first stage over embeddings that the chain's adapter maps; as it is where the chain has none.

    Lists of another system keep their candidates and get their distances anew; without embeddings they stay.
    """
    if chain.adapter is None:
        return first
    if first.embeddings is None:
        logger.warning(
            "the chain begins with adapt, which needs embeddings: the lists of %s stay as they are; give --embeddings "
            "or --extractor", config.candidates,
        )  # fmt: skip
        return first
    # A .tmp file is not copied to a bucket with unfinished work.
    mapped = first.embeddings.mapped(chain.adapter, folder / artifacts.SCRATCH / "adapted.tmp")
    if config.candidates is not None:
        distances = distances_of(first.lists, first.catalogue, mapped)
        return replace(first, embeddings=mapped, lists=first.lists.with_distances(distances))
    lists = retrieval.retrieve(
        first.catalogue, mapped, config.n_items, folder / "adapted_candidates", recall=config.recall, work=work,
        executors=executors,
    )  # fmt: skip
    return replace(first, embeddings=mapped, lists=without_junk(lists, first.catalogue))


def lists_for(
    chain: Chain, first: FirstStage, n_items: int, work: WorkConfig, out: Path, executors: Executors | None
) -> CandidateLists:
    """The lists that the chain works on: the queries' own, or those of all items if it looks at neighbourhoods.

    All candidates are gallery items, unless the chain is not inductive and some query is no gallery item: then queries
    are each other's candidates as well, and the log says so. Given lists stay those of their queries; the search here
    finds the others.
    """
    catalogue = first.catalogue
    if not chain.neighbourhood:
        return first.lists
    if is_one_against_rest(catalogue) and (not first.are_given or len(first.lists) == len(catalogue)):
        return first.lists
    if first.embeddings is None:
        raise BadInput("this chain looks at neighbourhoods and needs embeddings; give --embeddings or --extractor")
    everyone = replace(catalogue, table=catalogue.table.assign(is_query=True))
    if needs_joint_lists(chain, catalogue):
        everyone = catalogue.as_query_and_gallery()
        logger.info("%s: the answer to a query depends on the other queries of the catalogue", chain.describe())
    found = retrieval.retrieve(
        everyone, first.embeddings, n_items, out, recall=first.recall, work=work, executors=executors
    )
    if not first.are_given:
        return found
    others = ~torch.isin(found.query_items, first.lists.query_items)
    width = max(first.lists.items.shape[1], found.items.shape[1])
    both = concatenate([first.lists.padded(width), found[others.nonzero()[:, 0]].padded(width)])
    return both[both.query_items.argsort()]


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
        "retrieval": retrieval.retrieval_settings(config.n_items, work, config.recall),
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
    return artifacts.json_digest([file_digest(file) for file in files])
