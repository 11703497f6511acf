"""The scoring stage: candidate lists and a pairwise model in, a folder with the logit of every pair out.

Finished score blocks survive a kill. Rejects are stored with the block that met them, so that a continued run
reports the same ones as an uninterrupted run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import artifacts, tables
from distributed_rerank.data.candidates import CandidateLists, aligned_logits, pairs_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.decoding import is_readable
from distributed_rerank.data.rejects import Reject, check_rejects, reject_table, rejects_of
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.runtime.progress import progress
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring.plan import ScoreBlock, ScorePlan
from distributed_rerank.scoring.score import Score, ScoredBlock, ScoringCounters, score


@dataclass(frozen=True)
class PairLogits:
    """The scored part of candidate lists."""

    lists: CandidateLists
    """The first `top_n` candidates of each query, as they came in."""
    logits: Float32[np.ndarray, "query top_n"]
    """Larger = more different; NaN where the list is shorter or an image could not be read. Such a candidate
    counts as removed: callers drop it from the list, they do not rank it."""
    rejects: tuple[Reject, ...]
    n_images: int
    """Distinct images in the lists. Unlike the counts of the manifest it is the same for a continued run."""

    @property
    def n_pairs(self) -> int:
        """Pairs that have a logit."""
        return int(np.isfinite(self.logits).sum())


def score_candidates(
    catalogue: Catalogue,
    lists: CandidateLists,
    model: PairwiseModel,
    top_n: int,
    out: str | Path,
    *,
    work: WorkConfig | None = None,
    score: Score = score,
    overwrite: bool = False,
) -> PairLogits:
    """Logits of the first `top_n` candidates of each query, kept as pair_distances.parquet in the folder `out`.

    A killed run continues with the unfinished blocks; the manifest counts blocks, images and pairs of the last run.
    Raises BadInput for a folder that is damaged or was made from other inputs (`overwrite` recomputes it), for one
    begun on another kind of device or in another precision, for logits that are not finite, and, after all pairs were
    tried, when more than the share `work.max_rejects` of the images cannot be read.
    """
    out, work = Path(out), work or WorkConfig()
    lists = CandidateLists(lists.query_items, lists.items[:, :top_n], lists.distances[:, :top_n])
    plan = _plan(lists, model, work)
    fingerprint = _fingerprint(catalogue, lists, model, top_n, work, plan)
    if artifacts.recover(out, fingerprint, overwrite) or artifacts.is_complete(out, fingerprint, overwrite):
        return _read(out, catalogue, lists, plan)
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        counters = ScoringCounters()
        _compute(catalogue, lists, plan, model, work, staging, score, counters)
        logits = _reduce(staging, catalogue, lists, plan)
        rejects = _write(staging, catalogue, lists, logits)
        check_rejects(rejects, len(plan.items), work.max_rejects, str(staging.path / "rejects.parquet"))
        extra = {"n_rejected": len(rejects), "counts": counters.counts(), "seconds": counters.seconds()}
        staging.finish(extra, rows=int(np.isfinite(logits).sum()))
    return _read(out, catalogue, lists, plan)


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
    for array in lists:
        candidates.update(np.ascontiguousarray(array).data)
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


def _compute(
    catalogue: Catalogue,
    lists: CandidateLists,
    plan: ScorePlan,
    model: PairwiseModel,
    work: WorkConfig,
    staging: artifacts.Staging,
    score: Score,
    counters: ScoringCounters,
) -> None:
    """Score and store the blocks that are not stored; rejects go first, so that a stored block is a complete one."""
    scored, rejected = staging.blocks("pair_distances"), staging.blocks("rejects")
    stored = scored.done() & rejected.done()
    finished = {number for number in stored if not _is_repaired(rejected.read(number), catalogue)}
    todo = [number for number in range(len(plan.blocks)) if number not in finished]
    if not todo:
        return
    open_blocks = set(todo)
    results = score(plan, todo, catalogue.images, model, work, counters)
    for number, result in progress(results, total=len(todo), title="scoring pairs"):
        assert number in open_blocks, f"block {number} came twice or was not asked for"
        open_blocks.remove(number)
        for found in result.computed_with:
            staging.remember(found)
        rejected.write(number, reject_table(result.rejects, "score"))
        scored.write(number, _block_table(catalogue, lists, plan.blocks[number], result))
    assert not open_blocks, f"blocks {sorted(open_blocks)} never came back"


def _is_repaired(rejects: pa.Table, catalogue: Catalogue) -> bool:
    ids = [reject.id for reject in rejects_of(rejects)]
    return any(is_readable(ref) for ref in catalogue.images(catalogue.items_of(ids)))


def _block_table(catalogue: Catalogue, lists: CandidateLists, block: ScoreBlock, result: ScoredBlock) -> pa.Table:
    """The rows of one block. Asserts that exactly the pairs without an unreadable image have a logit."""
    query, column = np.nonzero(np.isfinite(result.logits))
    query_ids = catalogue.ids[lists.query_items[block.rows[query]]]
    gallery_ids = catalogue.ids[lists.items[block.rows[query], column]]
    unreadable = [reject.id for reject in result.rejects]
    exists = block.candidates >= 0
    lost = np.isin(catalogue.ids[lists.items[block.rows]], unreadable)
    lost |= np.isin(catalogue.ids[lists.query_items[block.rows]], unreadable)[:, None]
    is_scored = np.isfinite(result.logits)
    assert np.array_equal(is_scored, exists & ~lost), "a pair was lost, or scored without its images"
    return pairs_table(query_ids, gallery_ids, result.logits[query, column])


def _reduce(
    staging: artifacts.Staging, catalogue: Catalogue, lists: CandidateLists, plan: ScorePlan
) -> Float32[np.ndarray, "query top_n"]:
    store = staging.blocks("pair_distances")
    assert store.done() == set(range(len(plan.blocks))), "score blocks are missing"
    if not plan.blocks:
        return np.full(lists.items.shape, np.nan, np.float32)
    return aligned_logits(store.table(), catalogue, lists)


def _write(
    staging: artifacts.Staging, catalogue: Catalogue, lists: CandidateLists, logits: np.ndarray
) -> Sequence[Reject]:
    """Both tables of the output, pairs by query id and rank, rejects by id; returns the rejects."""
    query, column = np.nonzero(np.isfinite(logits))
    query_ids = catalogue.ids[lists.query_items[query]]
    gallery_ids = catalogue.ids[lists.items[query, column]]
    pairs = pairs_table(query_ids, gallery_ids, logits[query, column])
    tables.write_table(staging.path / "pair_distances.parquet", pairs, "pair_distances")
    store = staging.blocks("rejects")
    found = {reject.id: reject for number in store.done() for reject in rejects_of(store.read(number))}
    rejects = [found[id] for id in sorted(found)]
    tables.write_table(staging.path / "rejects.parquet", reject_table(rejects, "score"), "rejects")
    return rejects


def _read(out: Path, catalogue: Catalogue, lists: CandidateLists, plan: ScorePlan) -> PairLogits:
    logits = aligned_logits(tables.read_table(out, "pair_distances"), catalogue, lists)
    rejects = rejects_of(tables.read_table(out / "rejects.parquet", "rejects"))
    return PairLogits(lists, logits, tuple(rejects), len(plan.items))
