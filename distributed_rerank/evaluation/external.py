"""Another system's scores of pairs (a VLM, an API, the old service), put on the first stage's candidates."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from distributed_rerank.config.choices import UnscoredPairs
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.pair_values import PairValues

logger = logging.getLogger(__name__)


def scores_of(
    path: Path, lists: CandidateLists, catalogue: Catalogue
) -> tuple[Float32[Tensor, "query k"], dict[str, int]]:
    """The file's distance (or the negated score) of each candidate, NaN where it has none, and what is missing.

    Counted are candidates without a score (`unscored`), queries without any (`queries_unscored`), and scores of pairs
    that no list has (`unused`). Raises BadInput as `read_candidates` does.
    """
    given = read_candidates(path, catalogue)
    known = PairValues.of_lists(given, given.distances, len(catalogue))
    found = known.look_up(lists.query_items[:, None].expand_as(lists.items), lists.items)
    is_there, is_scored = lists.items >= 0, found.isfinite()
    counts = {
        "unscored": int((is_there & ~is_scored).sum()),
        "queries_unscored": int((~is_scored.any(dim=1) & is_there.any(dim=1)).sum()),
        "unused": len(known) - int(is_scored.sum()),
    }
    return found, counts


def rerank_by_scores(
    path: Path, lists: CandidateLists, catalogue: Catalogue, unscored: UnscoredPairs
) -> tuple[CandidateLists, dict[str, int]]:
    """The lists with the scored candidates first, best first, and the others behind them in their own order.

    Equal scores keep the order of the lists; the new distances are places. Raises BadInput where no candidate has a
    score, and with `unscored` "error" where any has none.
    """
    scores, counts = scores_of(path, lists, catalogue)
    is_scored = scores.isfinite()
    if not bool(is_scored.any()):
        raise BadInput(f"--external {path} scores no candidate of this first stage; score its lists")
    if unscored == "error" and counts["unscored"]:
        raise BadInput(
            f"--external {path} has no score of {counts['unscored']:,} candidates, and {counts['queries_unscored']:,} "
            "queries have none at all; score them, or let them stay behind the scored ones: --unscored behind"
        )
    if counts["unscored"]:
        logger.info(
            "--external %s: %d candidates have no score and stay behind those that have one; %d queries have no score "
            "at all and keep their order", path, counts["unscored"], counts["queries_unscored"],
        )  # fmt: skip
    if counts["unused"]:
        logger.warning("--external %s: %d scores are of pairs that no list has", path, counts["unused"])
    order = scores.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
    items = lists.items.gather(1, order)
    places = torch.arange(items.shape[1], dtype=torch.float32).expand(items.shape)
    return replace(lists, items=items, distances=places.masked_fill(items < 0, torch.inf)), counts
