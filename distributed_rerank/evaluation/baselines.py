"""Baselines without a trained head: neighbourhood re-ranking and query expansion, alone and after the pairwise step.

Each baseline re-orders or searches again, on sparse lists only, with constants that were not fitted to this catalogue.
Two of them use what training has fitted to the train labels in closed form, and their names in the report say so: the
adapted first stage, and MaxSim of the tokens' projections. One that cannot be run says why. Seconds are kept apart from
figures, whose bytes must not depend on time.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from distributed_rerank import retrieval
from distributed_rerank.chain.chain import AlphaQEStep, Chain, KReciprocalStep, PairwiseStep
from distributed_rerank.config.choices import UnscoredPairs
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.relevance import without_junk
from distributed_rerank.evaluation.external import rerank_by_scores
from distributed_rerank.evaluation.measure import COMPARED, LabelledQueries, Wanted, measure_ranking
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.executors import Executors
from distributed_rerank.models.maxsim import maxsim_of
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.reranking.first_stage import lists_for
from distributed_rerank.reranking.lists import only_gallery, without_rejected
from distributed_rerank.reranking.rankings import by_logits, rankings
from distributed_rerank.retrieval import SearchSide
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.tensors import metrics, sharding, statistics
from distributed_rerank.tensors.candidate_lists import CandidateLists, Ranking, concatenate
from distributed_rerank.tensors.metrics import PerQuery
from distributed_rerank.tensors.query_expansion import expand_embeddings

logger = logging.getLogger(__name__)

K_RECIPROCAL = KReciprocalStep()
EXPANSION = AlphaQEStep()
MAX_ITEMS = 200_000
"""Larger catalogues skip baselines: lists of all items would cost more than the evaluation."""
SMALL_SEARCH = 10**12
"""Queries x gallery x dimensions up to which this process searches: workers would take longer to start."""
PAIRWISE, EXTERNAL = "pairwise", "external"
TOP_N = 50
"""Candidates that MaxSim re-ranks if the chain has no pairwise step."""
MAX_ENCODED = 2_500
"""Images up to which MaxSim is measured: it encodes them a second time, in this process."""


@dataclass
class BaselineResults:
    """By name of the baseline: figures, metrics of every labelled query, and the seconds it took."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_query: dict[str, PerQuery] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def measure_baselines(
    queries: LabelledQueries,
    first_stage: PerQuery,
    reranked: PerQuery | None,
    sources: "Sources",
    *,
    seed: int,
    n_resamples: int = 2000,
) -> BaselineResults:
    """Compare every baseline with the first stage and, where there is one, with the re-ranked order.

    `first_stage` and `reranked` are `COMPARED` metrics of the labelled queries. `sources` keeps the lists of all items
    in its folder, resumable. A baseline's entry holds the ranking it starts from (`after`), its constants, `metrics`,
    `difference` to the first stage and `against_reranked` (baseline - re-ranked), or the reason why it was `skipped`.
    """
    results = BaselineResults()
    n_items = len(sources.ranked.first.catalogue)
    resampling = {"seed": seed, "n_resamples": n_resamples}
    for name, after, constants, compute in _plan(sources):
        entry: dict[str, Any] = {"after": after, "constants": constants}
        start = time.perf_counter()
        try:
            if n_items > MAX_ITEMS:
                raise Skipped(f"done for up to {MAX_ITEMS:,} items, here are {n_items:,}")
            ranking = compute()
        except Skipped as reason:
            results.figures[name] = entry | {"skipped": str(reason)}
            continue
        seconds = time.perf_counter() - start
        if name != PAIRWISE:  # its seconds are those of the scoring pass
            results.seconds[name] = round(seconds, 3)
        measured = measure_ranking(queries, ranking, Wanted((1, 10)))
        values = {key: measured.values[key] for key in COMPARED if key in first_stage}
        entry["metrics"] = metrics.means(values)
        entry["difference"] = statistics.compare_to_json(first_stage, values, queries.labels, **resampling)
        if reranked is not None:
            entry["against_reranked"] = statistics.compare_to_json(reranked, values, queries.labels, **resampling)
        results.figures[name], results.per_query[name] = entry, values
        logger.info("%s: mAP@10 %.4f in %.1f s", name, entry["metrics"]["map@10"], seconds)
    return results


class Skipped(Exception):
    """Raised where a baseline cannot be run; the text says why."""


def _plan(sources: "Sources") -> Iterator[tuple[str, str, dict[str, Any], Callable[[], Ranking]]]:
    """Name of each baseline, the ranking it starts from, its constants, and the function that computes it."""
    k_reciprocal, expansion = asdict(K_RECIPROCAL), asdict(EXPANSION)
    if sources.ranked.chain.adapt is not None:
        yield "adapted", "first_stage", asdict(sources.ranked.chain.adapt), lambda: sources.ranked.searched
    yield "k_reciprocal", "first_stage", k_reciprocal, lambda: sources.k_reciprocal(False)
    yield "query_expansion", "first_stage", expansion, lambda: sources.expand(False, True, False)
    yield "database_augmentation", "first_stage", expansion, lambda: sources.expand(False, False, True)
    yield "both_expansions", "first_stage", expansion, lambda: sources.expand(False, True, True)
    if sources.external is not None:
        lists, counts = sources.by_external_scores(sources.external)
        yield EXTERNAL, "first_stage", {"file": sources.external.name, **counts}, lambda: lists
    if isinstance(sources.model, TokenSiamese):
        yield "maxsim", "first_stage", {"top_n": sources.top_n}, sources.maxsim
    chain = sources.ranked.chain
    if chain.pairwise is None:
        return
    if chain.neighbourhood:
        yield PAIRWISE, "first_stage", asdict(chain.pairwise), sources.pairwise
    yield "pairwise+k_reciprocal", PAIRWISE, k_reciprocal, lambda: sources.k_reciprocal(True)
    yield "pairwise+query_expansion", PAIRWISE, expansion, lambda: sources.expand(True, True, False)
    yield "pairwise+database_augmentation", PAIRWISE, expansion, lambda: sources.expand(True, False, True)
    yield "pairwise+both_expansions", PAIRWISE, expansion, lambda: sources.expand(True, True, True)


@dataclass
class Sources:
    """The rankings and embeddings that baselines start from, and the baselines themselves."""

    ranked: Ranked
    n_items: int
    """Candidates that a search retrieves."""
    work: WorkConfig
    model: PairwiseModel | None
    folder: Path
    executors: Executors | None
    external: Path | None = None
    """File of another system's scores."""
    unscored: UnscoredPairs = "behind"
    all_lists: CandidateLists | None = None
    """The first stage's lists of all items, once they have been asked for."""

    def pairwise(self) -> Ranking:
        """The pairwise step without the chain steps after it."""
        assert self.ranked.pairwise is not None, "the chain has a pairwise step"
        return self.ranked.pairwise

    def by_external_scores(self, path: Path) -> tuple[CandidateLists, dict[str, int]]:
        """The candidates of the embeddings as they are in the order of another system's scores, and what is missing."""
        before = self.ranked.before[torch.arange(len(self.ranked.query_items))]
        return rerank_by_scores(path, before, self.ranked.catalogue, self.unscored)

    @property
    def top_n(self) -> int:
        """Candidates that MaxSim re-ranks: as many as the chain."""
        pairwise = self.ranked.chain.pairwise
        return TOP_N if pairwise is None else pairwise.top_n

    def maxsim(self) -> Ranking:
        """The first candidates ordered by the tokens that the model caches, without its trained head."""
        assert isinstance(self.model, TokenSiamese), "MaxSim needs tokens"
        ranked, catalogue = self.ranked, self.ranked.first.catalogue
        before = ranked.searched[torch.arange(len(ranked.query_items))]
        n_images = len(torch.unique(torch.cat([before.items[:, : self.top_n].flatten(), ranked.query_items])))
        if n_images > MAX_ENCODED:
            raise Skipped(f"encodes every image a second time, which is done for up to {MAX_ENCODED:,}")
        work = replace(self.work, max_rejects=1.0)
        scored = score_candidates(
            catalogue, before, maxsim_of(self.model), self.top_n, self.folder / "maxsim_pairs", work=work
        )
        assert scored.logits is not None, "pairs were scored"
        return by_logits(PairwiseStep(self.top_n, "replace"), before, scored.logits)

    def k_reciprocal(self, is_pairwise: bool) -> Ranking:
        """k-reciprocal re-ranking of the lists of all items."""
        lists = self._lists_of_all(is_pairwise)
        if lists.items.shape[1] < K_RECIPROCAL.k1:
            raise Skipped(f"lists of {lists.items.shape[1]} items are shorter than k1={K_RECIPROCAL.k1}")
        ranked = self.ranked
        by_depth = rankings(Chain((K_RECIPROCAL,)), ScoredLists(lists), ranked.catalogue, None, ranked.query_items)
        return next(iter(by_depth.values()))

    def expand(self, is_pairwise: bool, of_queries: bool, of_gallery: bool) -> CandidateLists:
        """A new search in which each query, each gallery item, or both have their neighbours' embeddings added."""
        ranked, embeddings = self.ranked, self.ranked.first.embeddings
        if embeddings is None:
            raise Skipped("a new search needs embeddings; give --embeddings or --extractor")
        catalogue = ranked.first.catalogue
        matrix = torch.from_numpy(embeddings.matrix[embeddings.rows_of(catalogue.ids)])
        gallery_items = torch.from_numpy(ranked.catalogue.gallery_items)
        queries, gallery = (
            torch.nn.functional.normalize(matrix[items]) for items in (ranked.query_items, gallery_items)
        )
        if of_queries:
            ranking = self.pairwise() if is_pairwise else ranked.searched
            queries = _expanded(matrix, ranked.query_items, ranking[torch.arange(len(ranked.query_items))])
        if of_gallery:
            lists = self._lists_of_all(is_pairwise).of_queries(gallery_items)
            gallery = _expanded(matrix, gallery_items, only_gallery(lists, ranked.catalogue))
        sides = ((queries, ranked.query_items.numpy()), (gallery, ranked.catalogue.gallery_items))
        sequences = catalogue.sequences
        return self._search(
            *(SearchSide(vectors.numpy(), items, sequences[items].astype(np.int64)) for vectors, items in sides)
        )

    def _search(self, queries: SearchSide, gallery: SearchSide) -> CandidateLists:
        """The nearest gallery items. The search is exact: it gives the same bits here and on workers of this kind."""
        n_products = len(queries.items) * len(gallery.items) * queries.embeddings.shape[1]
        executors = None if n_products <= SMALL_SEARCH else self.executors
        search = retrieval.search_blocks if executors is None else executors.search_blocks
        blocks = list(enumerate(sharding.blocks(len(queries.items), self.work.queries_per_search_block)))
        by_block = dict(search(blocks, queries, gallery, self.n_items, self.work))
        assert len(by_block) == len(blocks), "a block of queries never came back"
        found = concatenate([by_block[number].lists for number in sorted(by_block)])
        return without_junk(found, self.ranked.catalogue)

    def _lists_of_all(self, is_pairwise: bool) -> CandidateLists:
        """The lists of all items, by the first stage or after the pairwise step."""
        ranked = self.ranked
        if is_pairwise:
            if not ranked.covers_all_items:
                raise Skipped("needs the pairs of gallery items, which this chain does not score")
            return ranked.pairwise_lists().long()
        if self.all_lists is None:
            self.all_lists = ranked.scored.lists if ranked.covers_all_items else self._retrieve_all()
        return self.all_lists.long()

    def _retrieve_all(self) -> CandidateLists:
        ranked = self.ranked
        if ranked.first.embeddings is None:
            raise Skipped("needs the lists of gallery items; give --embeddings or --extractor")
        folder, chain = self.folder / "joint_candidates", Chain((K_RECIPROCAL,))
        lists = lists_for(chain, ranked.first, self.n_items, self.work, folder, self.executors)
        readable = without_rejected(ScoredLists(lists, rejects=ranked.scored.rejects), ranked.first.catalogue)
        return without_junk(readable.lists, ranked.first.catalogue)


def _expanded(matrix: Tensor, items: Int64[Tensor, " item"], lists: CandidateLists) -> Tensor:
    """The embeddings of these items with those of their first listed items added."""
    n_neighbours = min(EXPANSION.k, lists.items.shape[1])
    return expand_embeddings(matrix[items], matrix, lists.items, n_neighbours=n_neighbours, alpha=EXPANSION.alpha)


def columns(results: BaselineResults) -> dict[str, Float64[np.ndarray, " query"]]:
    """The baselines' columns of per_query.parquet: `map@10_k_reciprocal`, ..."""
    return {f"{key}_{name}": column.numpy() for name, part in results.per_query.items() for key, column in part.items()}
