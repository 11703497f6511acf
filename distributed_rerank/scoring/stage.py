"""The scoring stage: candidate lists and a pairwise model in, a folder with the logit of every pair out.

Finished score blocks survive a kill. Rejects are stored with the block that met them, so that a continued run reports
the same ones as an uninterrupted run.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.candidates import aligned_logits, pairs_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.decoding import readable_ids
from distributed_rerank.data.rejects import Reject, check_rejects, reject_table, rejects_of
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.runtime.progress import Progress
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring.plan import ScoreBlock, ScorePlan
from distributed_rerank.scoring.rounds import ScoredBlock, ScoreExecutors, Scoring
from distributed_rerank.scoring.score import score_blocks
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.storage import artifacts
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists

_QUERIES_PER_TABLE = 1 << 12
_PAIRS_PER_TABLE = 1 << 18


def score_candidates(
    catalogue: Catalogue,
    lists: CandidateLists,
    model: PairwiseModel,
    top_n: int,
    out: str | Path,
    *,
    work: WorkConfig | None = None,
    executors: ScoreExecutors | None = None,
    overwrite: bool = False,
) -> ScoredLists:
    """Logits of the first `top_n` candidates of each query, kept as pair_distances.parquet in the folder `out`.

    Computed by `executors`, by default in this process. A killed run continues with the unfinished blocks; the manifest
    counts blocks, images and pairs of the last run. Raises BadInput for a folder that is damaged or was made from other
    inputs (`overwrite` recomputes it), for one begun on another kind of device or in another precision, for logits that
    are not finite, and, after all pairs were tried, when more than the share `work.max_rejects` of the images cannot be
    read.
    """
    out, work = Path(out), work or WorkConfig()
    plan = _plan(lists.first(top_n), model, work)
    fingerprint = _fingerprint(catalogue, lists.first(top_n), model, top_n, work, plan)
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        return _read(out, catalogue, lists, top_n, plan)
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        scoring = Scoring(plan, _unfinished(staging, catalogue, plan), catalogue, model, work)
        todo = set(scoring.numbers)
        if todo:
            results = score_blocks(scoring) if executors is None else executors.score_blocks(scoring)
            with Progress(results, total=len(todo), title="scoring pairs") as bar:
                for number, result in results:
                    assert number in todo, f"block {number} came twice or was not asked for"
                    todo.remove(number)
                    _store(staging, catalogue, number, plan.blocks[number], result)
                    bar.update()
            assert not todo, f"blocks {sorted(todo)} never came back"
        n_pairs, rejects = _write(staging, catalogue, lists.first(top_n), plan)
        check_rejects(rejects, len(plan.items), work.max_rejects, str(staging.path / "rejects.parquet"))
        extra = {"n_rejected": len(rejects), "counts": scoring.counters.counts()}
        extra["seconds"] = scoring.counters.seconds()
        staging.finish(extra, rows=n_pairs)
    return _read(out, catalogue, lists, top_n, plan)


def _plan(lists: CandidateLists, model: PairwiseModel, work: WorkConfig) -> ScorePlan:
    top_n = max(1, lists.items.shape[1])
    return scoring_plan.make_plan(
        lists,
        top_n=top_n,
        queries_per_block=work.queries_per_block or scoring_plan.queries_per_block(top_n, model.gflop_per_pair()),
        images_per_batch=work.encode_batch,
        tapers=work.queries_per_block is None,
    )


def _fingerprint(
    catalogue: Catalogue,
    lists: CandidateLists,
    model: PairwiseModel,
    top_n: int,
    work: WorkConfig,
    plan: ScorePlan,
) -> dict[str, Any]:
    candidates = hashlib.sha256()
    queries, items, distances = lists.arrays()
    candidates.update(queries.data)
    # Some lists at a time, and items as int64: folders that were made when lists held these stay what they are.
    for values, kind in ((items, np.int64), (distances, np.float32)):
        for start, stop in sharding.blocks(len(lists), _QUERIES_PER_TABLE):
            candidates.update(np.ascontiguousarray(values[start:stop], kind).data)
    settings = {"top_n": top_n, **work.fingerprint_settings("score")}
    settings["queries_per_block"] = max((len(block.rows) for block in plan.blocks), default=0)
    settings["blocks"] = len(plan.blocks)
    return artifacts.make_fingerprint(
        "score",
        config=settings,
        catalogue=catalogue.digest(),
        candidates=candidates.hexdigest(),
        model=model.identity(),
    )


def _unfinished(staging: artifacts.Staging, catalogue: Catalogue, plan: ScorePlan) -> list[int]:
    """Numbers of the blocks that are not stored, or were stored with a reject that can be read by now."""
    scored, rejected = staging.blocks("pair_distances"), staging.blocks("rejects")
    stored = scored.done() & rejected.done()
    ids = {number: [reject.id for reject in rejects_of(rejected.read(number))] for number in stored}
    distinct = sorted({id for of_block in ids.values() for id in of_block})
    repaired = readable_ids(catalogue.images(catalogue.items_of(distinct))) if distinct else set()
    finished = {number for number in stored if not repaired & set(ids[number])}
    return [number for number in range(len(plan.blocks)) if number not in finished]


def _store(
    staging: artifacts.Staging, catalogue: Catalogue, number: int, block: ScoreBlock, result: ScoredBlock
) -> None:
    """Store a block, its rejects first, so that a stored block is a complete one.

    Asserts that exactly the pairs without an unreadable image have a logit.
    """
    unreadable = torch.from_numpy(catalogue.items_of([reject.id for reject in result.rejects]))
    lists, is_scored = block.lists, result.logits.isfinite()
    is_lost = torch.isin(lists.items, unreadable) | torch.isin(lists.query_items, unreadable)[:, None]
    assert torch.equal(is_scored, (lists.items >= 0) & ~is_lost), "a pair was lost, or scored without its images"
    for found in result.computed_with:
        staging.remember(found)
    staging.blocks("rejects").write(number, reject_table(result.rejects, "score"))
    staging.blocks("pair_distances").write(number, pairs_table(lists, result.logits, catalogue.ids))


def _write(
    staging: artifacts.Staging, catalogue: Catalogue, lists: CandidateLists, plan: ScorePlan
) -> tuple[int, Sequence[Reject]]:
    """Both tables of the output, pairs by query id and rank, rejects by id; returns their number, and the rejects."""
    store = staging.blocks("pair_distances")
    assert store.done() == set(range(len(plan.blocks))), "score blocks are missing"
    logits = aligned_logits(store.tables(), catalogue, lists)
    parts = sharding.blocks(len(lists), _QUERIES_PER_TABLE)
    pairs = (pairs_table(lists[start:stop], logits[start:stop], catalogue.ids) for start, stop in parts)
    n_pairs = tables.write_batches(staging.path / "pair_distances.parquet", pairs, "pair_distances")
    store = staging.blocks("rejects")
    found = {reject.id: reject for number in store.done() for reject in rejects_of(store.read(number))}
    rejects = [found[id] for id in sorted(found)]
    tables.write_table(staging.path / "rejects.parquet", reject_table(rejects, "score"), "rejects")
    return n_pairs, rejects


def _read(out: Path, catalogue: Catalogue, lists: CandidateLists, top_n: int, plan: ScorePlan) -> ScoredLists:
    pairs = tables.read_batches(out, "pair_distances", _PAIRS_PER_TABLE)
    logits = aligned_logits(pairs, catalogue, lists.first(top_n))
    rejects = rejects_of(tables.read_table(out / "rejects.parquet", "rejects"))
    return ScoredLists(lists, logits, tuple(rejects), len(plan.items))
