"""Rankings of queries that are computed on demand, and lists without what is no gallery item."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from distributed_rerank.chain.chain import Chain
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import Embeddings
from distributed_rerank.data.rejects import Reject
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.tensors.candidate_lists import CandidateLists


@dataclass(frozen=True)
class FirstStage:
    """The catalogue without its unreadable images, and the candidate lists of its queries."""

    catalogue: Catalogue
    lists: CandidateLists
    embeddings: Embeddings | None
    rejects: list[Reject]
    are_given: bool = False
    """Whether the lists come from another system and not from the search here."""
    n_without_list: int = 0
    """Queries that the lists of another system do not name; see `settle_missing_lists`."""
    recall: float | None = None
    """What searches must find of the nearest items; None: they are exact."""


@dataclass(frozen=True)
class LazyRanking:
    """A ranking of which only the rows that are asked for are computed, and in memory."""

    query_items: Int64[Tensor, " query"]
    compute: Callable[[Tensor], CandidateLists]
    """Gives the lists of the query items it gets."""

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> CandidateLists:
        """The lists of the queries in these rows."""
        return self.compute(self.query_items[rows])


def only_gallery(lists: CandidateLists, catalogue: Catalogue) -> CandidateLists:
    """The lists without what is no gallery item."""
    is_gallery = torch.zeros(len(catalogue) + 1, dtype=torch.bool)  # the last entry belongs to item -1
    is_gallery[:-1] = tensor_of(catalogue.is_gallery)
    is_kept = is_gallery[lists.items]
    if bool((is_kept | (lists.items < 0)).all()):
        return lists
    return lists.without(~is_kept)[0]


def is_one_against_rest(catalogue: Catalogue) -> bool:
    """Whether every item is both query and gallery item, so that the queries' lists are those of all items."""
    return len(catalogue.query_items) == catalogue.n_gallery == len(catalogue)


def needs_joint_lists(chain: Chain, catalogue: Catalogue) -> bool:
    """Whether queries have to be each other's candidates: for reciprocal neighbours of queries outside the gallery."""
    is_outside = not catalogue.is_gallery[catalogue.query_items].all()
    return bool(chain.neighbourhood) and is_outside and not chain.is_inductive


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
