"""From a catalogue to its rankings: which lists are scored, their logits, and the chain applied to them.

Evaluation and re-ranking of unlabelled lists share this path; they differ in what they do with the rankings.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distributed_rerank import retrieval
from distributed_rerank.chain import apply as chain_apply
from distributed_rerank.chain.chain import Chain, PairwiseStep, read_chain
from distributed_rerank.config.evaluation import FirstStageConfig, RerankerConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import artifacts
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.executors import Executors
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model, local_folder
from distributed_rerank.reranking.first_stage import FirstStage, without_junk
from distributed_rerank.reranking.known_distances import distances_of
from distributed_rerank.reranking.lists import LazyRanking, only_gallery
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.stage import ScoredLists, score_candidates
from distributed_rerank.tensors.candidate_lists import CandidateLists, Ranking, concatenate, places_of

logger = logging.getLogger(__name__)

CURVE = (2, 5, 10, 20, 50, 100, 200, 500)
"""Values of top_n that every scoring pass reports, as far as it reaches."""


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
    config.check_hub()
    path = local_folder(folder)
    model = load_model(path)
    has_own = chain == "model" and (path / "chain.json").is_file()
    if chain == "first_stage":
        found = Chain()
    elif chain == "replace" or (chain == "model" and not has_own):
        if chain == "model":
            logger.warning("%s has no chain.json: CANDIDATES ARE ORDERED BY THE LOGIT ALONE, as OML does", path)
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
    return len(catalogue.query_items) == catalogue.n_gallery == len(catalogue)


def needs_joint_lists(chain: Chain, catalogue: Catalogue) -> bool:
    """Whether queries have to be each other's candidates: for reciprocal neighbours of queries outside the gallery."""
    is_outside = not catalogue.is_gallery[catalogue.query_items].all()
    return bool(chain.neighbourhood) and is_outside and not chain.is_inductive


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
        first.catalogue, mapped, config.n_items, folder / "adapted_candidates", work=work, executors=executors
    )
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
    found = retrieval.retrieve(everyone, first.embeddings, n_items, out, work=work, executors=executors)
    if not first.are_given:
        return found
    others = ~torch.isin(found.query_items, first.lists.query_items)
    width = max(first.lists.items.shape[1], found.items.shape[1])
    both = concatenate([first.lists.padded(width), found[others.nonzero()[:, 0]].padded(width)])
    return both[both.query_items.argsort()]


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


def without_rejected(scored: ScoredLists, catalogue: Catalogue) -> ScoredLists:
    """The lists without unreadable queries and candidates; what stood behind a candidate moves up."""
    if not scored.rejects:
        return scored
    rejected = torch.from_numpy(catalogue.items_of([reject.id for reject in scored.rejects]))
    kept = (~torch.isin(scored.lists.query_items, rejected)).nonzero()[:, 0]
    lists = scored.lists[kept]
    shorter, columns = lists.without(torch.isin(lists.items, rejected))
    if scored.logits is None:
        return replace(scored, lists=shorter)
    # [query, k]: NaN behind the scored candidates; each logit moves with its candidate.
    logits = torch.full(lists.items.shape, torch.nan)
    logits[:, : scored.logits.shape[1]] = scored.logits[kept]
    return replace(scored, lists=shorter, logits=logits.gather(1, columns)[:, : scored.logits.shape[1]])


def rankings(
    chain: Chain,
    scored: ScoredLists,
    catalogue: Catalogue,
    embeddings: Embeddings | None,
    query_items: Tensor,
    curve: Sequence[int] = CURVE,
) -> dict[int, Ranking]:
    """Rankings of the queries by the whole chain, for the chain's top_n and every smaller one of `curve`.

    Without a pairwise step there is one, under the length of the lists; without any step it is the first stage's.
    """
    if chain.pairwise is None:
        return {scored.lists.items.shape[1]: _ranking(chain, scored, catalogue, embeddings, query_items)}
    deepest = chain.pairwise.top_n
    found = {}
    for top_n in (*(n for n in curve if n < deepest), deepest):
        steps = (*chain.before_search, replace(chain.pairwise, top_n=top_n), *chain.neighbourhood)
        found[top_n] = _ranking(replace(chain, steps=steps), scored, catalogue, embeddings, query_items)
    return found


def _ranking(
    chain: Chain, scored: ScoredLists, catalogue: Catalogue, embeddings: Embeddings | None, query_items: Tensor
) -> Ranking:
    """Lazy if a query's ranking depends on its own list only; computed at once if the chain needs all lists."""
    if chain.neighbourhood:
        return _rerank(chain, scored, catalogue, embeddings, query_items)
    return LazyRanking(query_items, lambda items: _rerank(chain, _part(scored, items), catalogue, embeddings, items))


def _part(scored: ScoredLists, query_items: Tensor) -> ScoredLists:
    """The lists of these queries, as far as they have one."""
    rows = places_of(scored.lists.query_items, query_items.unique())
    rows = rows[rows >= 0]
    return replace(scored, lists=scored.lists[rows], logits=None if scored.logits is None else scored.logits[rows])


def _rerank(
    chain: Chain, scored: ScoredLists, catalogue: Catalogue, embeddings: Embeddings | None, query_items: Tensor
) -> CandidateLists:
    lists = scored.lists
    if chain.pairwise is not None:
        assert scored.logits is not None, "a pairwise step needs logits"
        lists = by_logits(chain.pairwise, lists, scored.logits)
    if not chain.neighbourhood:
        return lists.of_queries(query_items)
    # The steps that follow need the lists of all items, row i being that of item i.
    everything = lists.of_queries(torch.arange(len(catalogue)))
    matrix = None
    if embeddings is not None:
        matrix = torch.from_numpy(embeddings.matrix[embeddings.rows_of(catalogue.ids)])
    sequences = tensor_of(catalogue.sequences).long()
    gallery = None if needs_joint_lists(chain, catalogue) else torch.from_numpy(catalogue.gallery_items)
    reranked = chain_apply.apply(
        replace(chain, steps=chain.neighbourhood), everything, None, matrix, sequences, gallery
    )
    return only_gallery(reranked[query_items], catalogue)


def by_logits(step: PairwiseStep, lists: CandidateLists, logits: Tensor) -> CandidateLists:
    """The lists after the pairwise step, where some of a row's last logits may be NaN.

    Such candidates stood behind the first top_n when pairs were scored, and moved up because an image before them could
    not be read. They stay behind the scored ones; a row with fewer than two of these is left as it is.
    """
    logits = logits[:, : step.top_n]
    # [query]: candidates that are scored, missing ones included; rows of one number are re-ordered together.
    is_scored = logits.isfinite() | (lists.items[:, : logits.shape[1]] < 0)
    n_scored = is_scored.sum(dim=1)
    items, distances = lists.items.clone(), lists.distances.clone()
    for n in n_scored.unique().tolist():
        if n < min(2, logits.shape[1]):
            continue
        rows = (n_scored == n).nonzero()[:, 0]
        shorter = step if n == logits.shape[1] else replace(step, top_n=n)
        ranked = chain_apply.apply_pairwise(shorter, lists[rows], logits[rows, :n])
        items[rows], distances[rows] = ranked.items, ranked.distances
    return replace(lists, items=items, distances=distances)
