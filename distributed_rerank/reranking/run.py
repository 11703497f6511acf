"""From a catalogue to its rankings: embed, retrieve, score, apply the chain. Layer 3.

Evaluation and re-ranking of unlabelled lists share this path; they differ in what they do with the rankings.
Every stage keeps its own resumable folder under `out`, and takes the step that may run on many devices as an
argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distributed_rerank import retrieval
from distributed_rerank.chain import apply as chain_apply
from distributed_rerank.chain.chain import Chain, PairwiseStep, read_chain
from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.candidates import CandidateLists
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.rejects import Reject
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, local_folder
from distributed_rerank.reranking.first_stage import FirstStage
from distributed_rerank.reranking.lists import LazyRanking, neighbours, only_gallery, rows_of
from distributed_rerank.scoring import score as scoring
from distributed_rerank.scoring import stage as scoring_run
from distributed_rerank.tensors.knn import Neighbours, Ranking

CURVE = (2, 5, 10, 20, 50, 100, 200, 500)
"""Values of top_n that every scoring pass reports, as far as it reaches."""


@dataclass(frozen=True)
class Scored:
    """Candidate lists with the logits of their first candidates; NaN where a list is shorter."""

    lists: CandidateLists
    logits: np.ndarray | None
    rejects: list[Reject]
    n_pairs: int = 0
    n_images: int = 0


def load_model_and_chain(config: RerankerConfig) -> tuple[PairwiseModel | None, Chain]:
    """A pairwise model and how its logits become an order.

    The chain is the model folder's chain.json (without one OML's rule), OML's rule, no step, or a chain.json of its
    own. `top_n` overrides the chain's; the default of OML's rule is 10. Raises BadInput for a top_n that the chain has
    no use for, and as `load_model` and `read_chain` do.
    """
    folder, chain, top_n = config.model, config.chain, config.top_n
    if folder is None:
        if chain not in ("model", "first_stage"):
            raise BadInput(f"--chain {chain} needs a pairwise model; give --model")
        if top_n is not None:
            raise BadInput(f"--top-n {top_n} needs a pairwise model; give --model")
        return None, Chain()
    path = local_folder(folder)
    model = load_model(path)
    has_own = chain == "model" and (path / "chain.json").is_file()
    if chain == "first_stage":
        found = Chain()
    elif chain == "replace" or (chain == "model" and not has_own):
        found = Chain((PairwiseStep(top_n=10 if top_n is None else top_n, rule="replace"),))
    else:
        found = read_chain(path if has_own else Path(chain))
    if top_n is None:
        return model, found
    if found.pairwise is None:
        raise BadInput(f"--top-n {top_n} changes nothing: the chain is {found.describe()}; add --chain replace")
    steps = tuple(replace(step, top_n=top_n) if isinstance(step, PairwiseStep) else step for step in found.steps)
    return model, replace(found, steps=steps)


def is_one_against_rest(catalogue: Catalogue) -> bool:
    """Whether every item is both query and gallery item, so that the queries' lists are those of all items."""
    return len(catalogue.query_items) == len(catalogue.gallery_items) == len(catalogue)


def lists_for(
    chain: Chain, first: FirstStage, n_items: int, work: WorkConfig, out: Path, search: retrieval.Search
) -> CandidateLists:
    """The lists that the chain works on: the queries' own, or those of all items where it looks at neighbourhoods."""
    catalogue = first.catalogue
    if not chain.neighbourhood or is_one_against_rest(catalogue):
        return first.lists
    if first.embeddings is None:
        raise BadInput("this chain looks at neighbourhoods and needs embeddings; give --embeddings or --extractor")
    return retrieval.retrieve(
        catalogue.as_query_and_gallery(), first.embeddings, n_items, out, work=work, search=search
    )


def score_lists(
    lists: CandidateLists,
    catalogue: Catalogue,
    model: PairwiseModel,
    chain: Chain,
    work: WorkConfig,
    out: Path,
    score: scoring.Score,
) -> Scored:
    """Logits of the first candidates, if the chain wants any; images that cannot be read leave the lists."""
    if chain.pairwise is None:
        return Scored(lists, None, [])
    result = scoring_run.score_candidates(catalogue, lists, model, chain.pairwise.top_n, out, work=work, score=score)
    scored = Scored(lists, result.logits, list(result.rejects), result.n_pairs, result.n_images)
    return without_rejected(scored, catalogue)


def without_rejected(scored: Scored, catalogue: Catalogue) -> Scored:
    """The lists without unreadable queries and candidates; what stood behind a candidate moves up by one."""
    if not scored.rejects:
        return scored
    rejected = catalogue.items_of([reject.id for reject in scored.rejects])
    lists = scored.lists
    kept = np.flatnonzero(~np.isin(lists.query_items, rejected))
    items, distances = lists.items[kept], lists.distances[kept]
    logits = np.full(items.shape, np.nan, np.float32)
    if scored.logits is not None:
        logits[:, : scored.logits.shape[1]] = scored.logits[kept]
    is_gone = np.isin(items, rejected)
    order = np.argsort(is_gone, axis=1, kind="stable")
    items, distances, logits = (
        np.take_along_axis(np.where(is_gone, empty, values), order, axis=1)
        for values, empty in ((items, -1), (distances, np.inf), (logits, np.nan))
    )
    width = 0 if scored.logits is None else scored.logits.shape[1]
    shorter = CandidateLists(lists.query_items[kept], items, distances.astype(np.float32))
    return replace(scored, lists=shorter, logits=logits[:, :width].astype(np.float32))


def rankings(
    chain: Chain,
    scored: Scored,
    catalogue: Catalogue,
    embeddings: Embeddings | None,
    query_items: Tensor,
    curve: Sequence[int] = CURVE,
) -> dict[int, Ranking]:
    """Rankings of the queries by the whole chain, for the chain's top_n and every smaller one of `curve`.

    Without a pairwise step there is one, under the length of the lists; without any step it is the first
    stage's.
    """
    depth = scored.lists.items.shape[1]
    if chain.pairwise is None:
        return {depth: _ranking(chain, scored, catalogue, embeddings, query_items)}
    deepest = chain.pairwise.top_n
    found = {}
    for top_n in (*(n for n in curve if n < deepest), deepest):
        steps = (replace(chain.pairwise, top_n=top_n), *chain.neighbourhood)
        found[top_n] = _ranking(replace(chain, steps=steps), scored, catalogue, embeddings, query_items)
    return found


def _ranking(
    chain: Chain, scored: Scored, catalogue: Catalogue, embeddings: Embeddings | None, query_items: Tensor
) -> Ranking:
    """Made when asked for where a query's row follows from its own list; at once where it needs all lists."""
    if chain.neighbourhood:
        return _ranked(chain, scored, catalogue, embeddings, query_items)
    return LazyRanking(query_items, lambda items: _ranked(chain, _part(scored, items), catalogue, embeddings, items))


def _part(scored: Scored, query_items: Tensor) -> Scored:
    """The lists of these queries, as far as they have one."""
    lists, wanted = scored.lists, np.unique(query_items.numpy())
    rows = np.searchsorted(lists.query_items, wanted)
    rows = rows[np.searchsorted(lists.query_items, wanted, side="right") > rows]
    logits = None if scored.logits is None else scored.logits[rows]
    return replace(scored, lists=CandidateLists(*(array[rows] for array in lists)), logits=logits)


def _ranked(
    chain: Chain, scored: Scored, catalogue: Catalogue, embeddings: Embeddings | None, query_items: Tensor
) -> Neighbours:
    logits = None if scored.logits is None else torch.from_numpy(scored.logits)
    lists = neighbours(scored.lists)
    if chain.pairwise is not None:
        assert logits is not None, "a pairwise step needs logits"
        lists = by_logits(chain.pairwise, lists, logits)
    reordered = CandidateLists(scored.lists.query_items, lists.items.numpy(), lists.distances.numpy())
    if not chain.neighbourhood:
        return rows_of(reordered, query_items)
    everything = rows_of(reordered, torch.arange(len(catalogue)))
    matrix = None
    if embeddings is not None:
        matrix = torch.from_numpy(embeddings.matrix[embeddings.rows_of(catalogue.ids)])
    sequences = torch.from_numpy(catalogue.sequences)
    ranked = chain_apply.apply(replace(chain, steps=chain.neighbourhood), everything, None, matrix, sequences)
    return only_gallery(Neighbours(ranked.items[query_items], ranked.distances[query_items]), catalogue)


def by_logits(step: PairwiseStep, lists: Neighbours, logits: Tensor) -> Neighbours:
    """The lists after the pairwise step, where some of a row's last logits may be NaN.

    Such candidates stood behind the first top_n when pairs were scored, and moved up because an image before
    them could not be read. They stay behind the scored ones; a row with fewer than two of these is left as it
    is.
    """
    logits = logits[:, : step.top_n]
    is_scored = logits.isfinite() | (lists.items[:, : logits.shape[1]] < 0)
    n_scored = is_scored.sum(dim=1)
    items, distances = lists.items.clone(), lists.distances.clone()
    for n in n_scored.unique().tolist():
        rows = n_scored == n
        if n < min(2, logits.shape[1]):
            continue
        shorter = step if n == logits.shape[1] else replace(step, top_n=n)
        part = Neighbours(lists.items[rows], lists.distances[rows])
        ranked = chain_apply.apply_pairwise(shorter, part, logits[rows, :n])
        items[rows], distances[rows] = ranked.items, ranked.distances
    return Neighbours(items, distances)
