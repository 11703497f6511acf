"""What needs no training: neighbourhood re-ranking and query expansion, alone and after the pairwise step. Layer 3.

Each baseline re-orders or searches again with constants that nobody has fitted to this catalogue, on sparse lists
only. One that cannot be run says why. Seconds are kept apart from figures, whose bytes must not depend on them.
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
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.evaluation.measure import LabelledQueries, difference, measure_ranking
from distributed_rerank.evaluation.ranked import Ranked
from distributed_rerank.models.maxsim import maxsim_of
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.reranking import run as ranking_run
from distributed_rerank.reranking.config import EvaluationConfig
from distributed_rerank.reranking.first_stage import Executors
from distributed_rerank.reranking.lists import neighbours, only_gallery, rows_of
from distributed_rerank.reranking.run import Scored
from distributed_rerank.retrieval import SearchSide
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.tensors import metrics, sharding
from distributed_rerank.tensors.knn import Neighbours, Ranking
from distributed_rerank.tensors.metrics import PerQuery
from distributed_rerank.tensors.query_expansion import expand_embeddings

logger = logging.getLogger(__name__)

K_RECIPROCAL = KReciprocalStep()
EXPANSION = AlphaQEStep()
KEYS = ("cmc@1", "map@10")
"""Metrics of a baseline, as far as the evaluation measures them."""
MAX_ITEMS = 200_000
"""Larger catalogues skip baselines: the lists of all items would cost more than the evaluation."""
SMALL_SEARCH = 10**12
"""Queries x gallery x dimensions up to which a search is done here: workers would take longer to start."""
PAIRWISE = "pairwise"
TOP_N = 50
"""Candidates that MaxSim re-ranks where the chain has no pairwise step."""
MAX_ENCODED = 2_500
"""Images up to which MaxSim is measured: it encodes them a second time, in this process."""


@dataclass
class BaselineResults:
    """Figures by baseline, their value for every labelled query, and the seconds each took."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_query: dict[str, PerQuery] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def measure_baselines(
    ranked: Ranked,
    queries: LabelledQueries,
    first_stage: PerQuery,
    reranked: PerQuery | None,
    config: EvaluationConfig,
    model: PairwiseModel | None,
    folder: Path,
    steps: Executors,
    *,
    n_resamples: int = 2000,
) -> BaselineResults:
    """Every baseline against the first stage and, where there is one, against the re-ranked order.

    `first_stage` and `reranked` are metrics of the labelled queries, of which `KEYS` are taken. The lists of all items
    are kept in `folder`, resumable. A baseline's entry holds what it follows (`after`), its constants, `metrics`,
    `difference` to the first stage and `against_reranked` (baseline - re-ranked), or `skipped`, the reason.
    """
    found = BaselineResults()
    n_items = len(ranked.first.catalogue)
    sources = _Sources(ranked, config, model, folder, steps)
    keys = [key for key in KEYS if key in first_stage]
    for name, after, constants, make in _plan(sources):
        entry: dict[str, Any] = {"after": after, "constants": constants}
        start = time.perf_counter()
        try:
            if n_items > MAX_ITEMS:
                raise Skipped(f"done for up to {MAX_ITEMS:,} items, here are {n_items:,}")
            ranking = make()
        except Skipped as reason:
            found.figures[name] = entry | {"skipped": str(reason)}
            continue
        seconds = time.perf_counter() - start
        if name != PAIRWISE:  # whose seconds are those of the scoring pass
            found.seconds[name] = round(seconds, 3)
        measured = measure_ranking(queries, ranking, (1, 10))
        values = {key: measured.values[key] for key in keys}
        entry["metrics"] = metrics.means(values)
        entry["difference"] = difference(first_stage, values, queries.labels, config.seed, n_resamples)
        if reranked is not None:
            entry["against_reranked"] = difference(reranked, values, queries.labels, config.seed, n_resamples)
        found.figures[name], found.per_query[name] = entry, values
        logger.info("%s: mAP@10 %.4f in %.1f s", name, entry["metrics"]["map@10"], seconds)
    return found


class Skipped(Exception):
    """A baseline cannot be run; the text says why."""


Make = Callable[[], Ranking]


def _plan(sources: "_Sources") -> Iterator[tuple[str, str, dict[str, Any], Make]]:
    """Name, what it follows, constants and the work of each baseline."""
    k_reciprocal, expansion = asdict(K_RECIPROCAL), asdict(EXPANSION)
    yield "k_reciprocal", "first_stage", k_reciprocal, lambda: sources.k_reciprocal(False)
    yield "query_expansion", "first_stage", expansion, lambda: sources.expand(False, True, False)
    yield "database_augmentation", "first_stage", expansion, lambda: sources.expand(False, False, True)
    yield "both_expansions", "first_stage", expansion, lambda: sources.expand(False, True, True)
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


class _Sources:
    """The lists and embeddings that baselines start from, each made once."""

    def __init__(
        self, ranked: Ranked, config: EvaluationConfig, model: PairwiseModel | None, folder: Path, steps: Executors
    ) -> None:
        self.ranked = ranked
        self.model = model
        self._config = config.retrieval
        self._scoring = config.scoring
        self._folder = folder
        self._steps = steps
        self._all: CandidateLists | None = None

    def pairwise(self) -> Ranking:
        """The pairwise step without what follows it in the chain."""
        assert self.ranked.pairwise is not None, "the chain has a pairwise step"
        return self.ranked.pairwise

    @property
    def top_n(self) -> int:
        """Candidates that MaxSim re-ranks: as many as the chain does."""
        pairwise = self.ranked.chain.pairwise
        return TOP_N if pairwise is None else pairwise.top_n

    def maxsim(self) -> Ranking:
        """The first candidates by the tokens that the model caches, without its trained head."""
        assert isinstance(self.model, TokenSiamese), "MaxSim needs tokens"
        ranked = self.ranked
        own = ranked.before[torch.arange(len(ranked.query_items))]
        n_images = len(torch.unique(torch.cat([own.items[:, : self.top_n].flatten(), ranked.query_items])))
        if n_images > MAX_ENCODED:
            raise Skipped(f"encodes every image a second time, which is done for up to {MAX_ENCODED:,}")
        lists = CandidateLists(ranked.query_items.numpy(), own.items.numpy(), own.distances.numpy())
        config = replace(self._scoring, top_n=self.top_n)
        scored = score_candidates(
            ranked.first.catalogue, lists, maxsim_of(self.model), config, self._folder / "maxsim_pairs", max_rejects=1.0
        )
        return ranking_run.by_logits(PairwiseStep(self.top_n, "replace"), own, torch.from_numpy(scored.logits))

    def k_reciprocal(self, is_pairwise: bool) -> Ranking:
        """k-reciprocal re-ranking of the lists of all items."""
        lists = self._lists_of_all(is_pairwise)
        if lists.items.shape[1] < K_RECIPROCAL.k1:
            raise Skipped(f"lists of {lists.items.shape[1]} items are shorter than k1={K_RECIPROCAL.k1}")
        ranked = self.ranked
        found = ranking_run.rankings(
            Chain((K_RECIPROCAL,)), Scored(lists, None, []), ranked.catalogue, None, ranked.query_items
        )
        return next(iter(found.values()))

    def expand(self, is_pairwise: bool, of_queries: bool, of_gallery: bool) -> Neighbours:
        """A new search with the embeddings of the queries, of the gallery, or of both expanded by their lists."""
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
            own = ranked.pairwise if is_pairwise else ranked.before
            assert own is not None, "the chain has a pairwise step"
            queries = _expanded(matrix, ranked.query_items, own[torch.arange(len(ranked.query_items))])
        if of_gallery:
            lists = rows_of(self._lists_of_all(is_pairwise), gallery_items)
            gallery = _expanded(matrix, gallery_items, only_gallery(lists, ranked.catalogue))
        sequences = catalogue.sequences
        return self._search(
            SearchSide(queries.numpy(), ranked.query_items.numpy(), sequences[ranked.query_items.numpy()]),
            SearchSide(gallery.numpy(), ranked.catalogue.gallery_items, sequences[ranked.catalogue.gallery_items]),
        )

    def _search(self, queries: SearchSide, gallery: SearchSide) -> Neighbours:
        """Exact search, so where it is done changes no bit of the answer on one kind of processor."""
        work = len(queries.items) * len(gallery.items) * queries.embeddings.shape[1]
        search = retrieval.search if work <= SMALL_SEARCH else self._steps.search
        blocks = list(enumerate(sharding.blocks(len(queries.items), self._config.queries_per_block)))
        found = dict(search(blocks, queries, gallery, self._config))
        assert len(found) == len(blocks), "a block of queries never came back"
        parts = [neighbours(found[number].lists) for number in sorted(found)]
        return Neighbours(torch.cat([part.items for part in parts]), torch.cat([part.distances for part in parts]))

    def _lists_of_all(self, is_pairwise: bool) -> CandidateLists:
        """The lists of all items, by the first stage or after the pairwise step."""
        ranked = self.ranked
        if is_pairwise:
            if not ranked.covers_all_items:
                raise Skipped("needs the pairs of gallery items, which this chain does not score")
            return ranked.pairwise_lists()
        if self._all is None:
            self._all = ranked.scored.lists if ranked.covers_all_items else self._retrieved()
        return self._all

    def _retrieved(self) -> CandidateLists:
        ranked = self.ranked
        if ranked.first.embeddings is None:
            raise Skipped("needs the lists of gallery items; give --embeddings or --extractor")
        lists = ranking_run.lists_for(
            Chain((K_RECIPROCAL,)), ranked.first, self._config, self._folder / "all_candidates", self._steps
        )
        cleared = Scored(lists, None, ranked.scored.rejects)
        return ranking_run.without_rejected(cleared, ranked.first.catalogue).lists


def _expanded(matrix: Tensor, items: Int64[Tensor, " item"], lists: Neighbours) -> Tensor:
    """The embeddings of these items with those of the first of their lists added."""
    n_neighbours = min(EXPANSION.k, lists.items.shape[1])
    return expand_embeddings(matrix[items], matrix, lists.items, n_neighbours=n_neighbours, alpha=EXPANSION.alpha)


def columns(found: BaselineResults) -> dict[str, Float64[np.ndarray, " query"]]:
    """The columns that per_query.parquet has for the baselines: `map@10_k_reciprocal`, ..."""
    return {f"{key}_{name}": column.numpy() for name, part in found.per_query.items() for key, column in part.items()}
