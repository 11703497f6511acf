"""Which lists a chain works on, with the logits of their pairs.

Evaluation and re-ranking of unlabelled lists share this step; they differ in what they do with the rankings.
"""

import logging
from pathlib import Path

from distributed_rerank.chain.chain import Chain
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.executors import Executors
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.reranking.first_stage import lists_for
from distributed_rerank.reranking.lists import FirstStage, without_rejected
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.scoring.stage import score_candidates

logger = logging.getLogger(__name__)


def score_first_stage(
    first: FirstStage,
    chain: Chain,
    model: PairwiseModel | None,
    n_items: int,
    work: WorkConfig,
    folder: Path,
    executors: Executors | None,
) -> ScoredLists:
    """The lists that the chain works on, with logits if it wants any; images that cannot be read leave the lists.

    Lists and logits are kept in `folder`.
    """
    lists = lists_for(chain, first, n_items, work, folder / "all_candidates", executors)
    if model is None or chain.pairwise is None:
        return ScoredLists(lists)
    top_n, gflop = chain.pairwise.top_n, model.gflop_per_pair()
    n_pairs = int((lists.first(top_n).items >= 0).count_nonzero())
    logger.info(
        "%d pairs, %.4g GFLOP each, %.4g TFLOP in all; %d bytes an image", n_pairs, gflop, n_pairs * gflop / 1000,
        model.bytes_per_image,
    )  # fmt: skip
    scored = score_candidates(
        first.catalogue, lists, model, top_n, folder / "pair_distances", work=work, executors=executors
    )
    return without_rejected(scored, first.catalogue)
