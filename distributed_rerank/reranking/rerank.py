"""Candidate lists re-ordered without labels: own lists, or those that any vector database returned."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distributed_rerank.approximate import approximate_searches
from distributed_rerank.chain.chain import Chain
from distributed_rerank.chain.probability import probabilities
from distributed_rerank.chain.views import things_of
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.rejects import all_rejects
from distributed_rerank.executors import Executors
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.reranking.first_stage import (
    check_depth,
    first_stage,
    first_stage_settings,
    input_digests,
    search_adapted,
)
from distributed_rerank.reranking.known_distances import known_distances
from distributed_rerank.reranking.lists import FirstStage
from distributed_rerank.reranking.pair_logits import score_first_stage
from distributed_rerank.reranking.rankings import rankings
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.files import atomic_path, write_json
from distributed_rerank.tensors.candidate_lists import CandidateLists, places_of
from distributed_rerank.tensors.suspects import most_uncertain

logger = logging.getLogger(__name__)

N_LABEL_NEXT = 50
"""Queries that label_next.csv names."""


def rerank(
    catalogue: Catalogue,
    config: FirstStageConfig,
    out: Path,
    *,
    model: PairwiseModel,
    chain: Chain,
    work: WorkConfig | None = None,
    executors: Executors | None = None,
    overwrite: bool = False,
) -> pa.Table:
    """Re-order the candidate lists of the catalogue's queries; returns the table that reranked.parquet holds.

    Its rows are ordered by query id and rank (from 1): `query_id, gallery_id, rank, distance` (the chain's;
    small = same), `first_stage_rank, first_stage_distance, logit` (null behind the chain's top_n) and
    `probability` of a match (null there too, and where the chain has no calibration). Queries without a list
    have no row, unless `config.missing_lists` refuses them. No labels are needed. Where the catalogue has a column
    `item`, items.parquet has the things that the candidates show: `query_id, item, rank, gallery_id` (its first
    photo), `n_photos` (in the list) and `probability`. label_next.csv names the queries to label first. A
    finished `out` is not computed again, a killed run continues. Raises BadInput where the
    inputs do not fit together, naming ids that the catalogue does not have.
    """
    work = work or WorkConfig()
    check_depth(config, chain)
    if not chain.steps:
        logger.warning("the chain is the first stage alone: THE ORDER OF THE LISTS STAYS AS IT IS")
    fingerprint = artifacts.make_fingerprint(
        "rerank",
        config=first_stage_settings(config, work) | {"scoring": work.fingerprint_settings("score")},
        catalogue=catalogue.digest(),
        given=input_digests(config),
        model=model.identity(),
        chain=chain.identity(),
        calibration={name: chain.calibration.get(name) for name in ("slope", "intercept")},
    )
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        logger.info("%s is complete: nothing to do", out)
        return pq.read_table(out / "reranked.parquet")
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        timings: dict[str, float] = {}
        known = known_distances(model, chain)
        first = first_stage(catalogue, config, work, staging.path, executors, timings, "miss", known)
        searched = search_adapted(first, chain, config, work, staging.path, executors)
        scored = score_first_stage(searched, chain, model, config.n_items, work, staging.path, executors)
        after = _reranked(first.catalogue, first.lists, scored, chain, searched)
        table = _rows(first.catalogue, after, first.lists, scored, chain)
        rejects = all_rejects(first.rejects, scored.rejects)
        tables.write_table(
            staging.path / "rejects.parquet", pa.Table.from_pandas(rejects, preserve_index=False), "rejects"
        )
        _write_answers(staging.path, table, first.catalogue, after, chain)
        write_json(staging.path / "timings.json", {"seconds": timings})
        told = {} if config.recall is None else {"search": approximate_searches(staging.path)}
        staging.finish({"chain": chain.describe(), "n_rejected": len(rejects), **told}, rows=len(table))
    return table


def _write_answers(folder: Path, table: pa.Table, catalogue: Catalogue, after: CandidateLists, chain: Chain) -> None:
    """Writes reranked.parquet, items.parquet where the catalogue has things, and label_next.csv."""
    with atomic_path(folder / "reranked.parquet") as temporary:
        pq.write_table(table, temporary)
    things = _things_table(catalogue, after, chain)
    if things is not None:
        with atomic_path(folder / "items.parquet") as temporary:
            pq.write_table(things, temporary)
    with atomic_path(folder / "label_next.csv") as temporary:
        _label_next(catalogue, after, chain).to_csv(temporary, index=False)


def _reranked(
    catalogue: Catalogue, before: CandidateLists, scored: ScoredLists, chain: Chain, first: FirstStage
) -> CandidateLists:
    query_items = before.query_items
    if scored.rejects:
        gone = torch.from_numpy(catalogue.items_of([reject.id for reject in scored.rejects]))
        query_items = query_items[~torch.isin(query_items, gone)]
    ranked = rankings(chain, scored, catalogue, first.embeddings, query_items, curve=())
    return next(iter(ranked.values()))[torch.arange(len(query_items))]


def _label_next(catalogue: Catalogue, after: CandidateLists, chain: Chain) -> pd.DataFrame:
    """The queries to label first: whose first candidate may as well be wrong, with as many first candidates as can be.

    Columns `query_id, gallery_id` (the first candidate) and `probability` of a match. Without a calibration those are
    the least certain whose first two candidates are nearest to each other.
    """
    rows = (after.items[:, :1] >= 0).any(dim=1).nonzero()[:, 0]
    lists = after[rows]
    found = probabilities(chain, lists.distances[:, :1])
    if found is not None:
        found = found[:, 0]
        certainty = (found - 0.5).abs()
    else:
        head = lists.distances[:, :2].double()
        certainty = head[:, -1] - head[:, 0]
    chosen = most_uncertain(certainty, lists.items[:, :1].reshape(-1), N_LABEL_NEXT)
    return pd.DataFrame(
        {
            "query_id": catalogue.ids[lists.query_items[chosen].numpy()],
            "gallery_id": catalogue.ids[lists.items[chosen, :1].reshape(-1).numpy()],
            "probability": None if found is None else found[chosen].numpy().round(6),
        }
    )


def _things_table(catalogue: Catalogue, after: CandidateLists, chain: Chain) -> pa.Table | None:
    """items.parquet: what the candidates of each query show, ordered by query id and rank; None without that column."""
    if catalogue.things is None:
        return None
    found = things_of(chain, after, torch.from_numpy(catalogue.things))
    row, column = (found.things >= 0).nonzero(as_tuple=True)
    ids, names = pa.array(catalogue.ids, pa.string()), pa.array(catalogue.thing_names, pa.string())
    probability = found.probabilities[row, column].numpy()
    return pa.table(
        {
            "query_id": ids.take(pa.array(after.query_items[row].numpy())),
            "item": names.take(pa.array(found.things[row, column].numpy())),
            "rank": pa.array((column + 1).numpy(), pa.int32()),
            "gallery_id": ids.take(pa.array(found.views[row, column].numpy())),
            "n_photos": pa.array(found.n_views[row, column].numpy(), pa.int32()),
            "probability": pa.array(probability, pa.float32(), mask=np.isnan(probability)),
        }
    )


def _rows(
    catalogue: Catalogue, after: CandidateLists, before: CandidateLists, scored: ScoredLists, chain: Chain
) -> pa.Table:
    query_items, items, distances = after.arrays()
    row, column = np.nonzero(items >= 0)
    queries, gallery = query_items[row], items[row, column]
    first_rank, first_distance = _look_up(before, before.distances, queries, gallery)
    logit: Any = np.full(len(row), np.nan, np.float32)
    if scored.logits is not None:
        _, logit = _look_up(scored.lists.first(scored.logits.shape[1]), scored.logits, queries, gallery)
    probability = probabilities(chain, after.distances[row, column])
    no_probability = np.isnan(logit) if chain.pairwise is not None else np.zeros(len(row), bool)
    names = pa.array(catalogue.ids, pa.string())
    return pa.table(
        {
            "query_id": names.take(pa.array(queries)),
            "gallery_id": names.take(pa.array(gallery)),
            "rank": pa.array(column + 1, pa.int32()),
            "distance": pa.array(distances[row, column], pa.float32()),
            "first_stage_rank": pa.array(first_rank, pa.int32(), mask=first_rank < 1),
            "first_stage_distance": pa.array(first_distance, pa.float32(), mask=np.isnan(first_distance)),
            "logit": pa.array(logit, pa.float32(), mask=np.isnan(logit)),
            "probability": pa.nulls(len(row), pa.float32())
            if probability is None
            else pa.array(probability.numpy().astype(np.float32), pa.float32(), mask=no_probability),
        }
    )


def _look_up(
    lists: CandidateLists, values: torch.Tensor, queries: np.ndarray, gallery: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rank (from 1; 0 = absent) and value (NaN = absent) of each (query, gallery item) in the lists."""
    row, column = (lists.items >= 0).nonzero(as_tuple=True)
    # One number for each pair in the lists, ascending, and for each pair that is looked up.
    n = int(max(lists.items.max() if len(row) else 0, gallery.max(initial=0))) + 1
    keys, order = (lists.query_items[row] * n + lists.items[row, column]).sort()
    places = places_of(keys, torch.from_numpy(queries * n + gallery))
    # The last rank and value belong to place -1.
    ranks = torch.cat([column[order] + 1, torch.zeros(1, dtype=torch.int64)])
    found = torch.cat([values[row, column][order], torch.full((1,), torch.nan)])
    return ranks[places].numpy().astype(np.int32), found[places].numpy()
