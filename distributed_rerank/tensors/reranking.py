"""New order and distances of candidate lists from pair logits: OML's rule (replace) and fusion.

Both take rows as `CandidateLists` holds them (distance inf = no candidate there), work on all queries at once and
change nothing in place. An answer is `(order, distances)`: `order[q, i]` is the old position of the candidate that is
now at place i. Logits of absent candidates are ignored.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput

OML_GAP = 1000 * 2.0**-23

Reranked = tuple[Int64[Tensor, "query k"], Float[Tensor, "query k"]]


def merge_replace(distances: Float[Tensor, "query k"], logits: Float[Tensor, "query n"]) -> Reranked:
    """Order the first n of each row by their logits alone, and scale these to stay before the tail.

    OML's `PairwiseReranker` (STIR, arXiv 2304.13393): with s the sorted logits of the head and t the first tail
    distance, if max(s) > t the head becomes s * (t / max(s)) - 1000 * eps(float32), else it stays s. Equality does not
    scale; a row without a tail keeps its raw logits; ties keep the first stage's order; the tail never changes. Pass
    the values that OML takes as distances (`sigmoid(logit)` for ConcatSiamese).

    Different from OML: eps is always float32's; for t <= 0 the head is shifted before the tail (OML raises a
    RuntimeError for t < 0 and gives the whole head one value for t = 0); if all rows are empty the answer is a copy
    (there a ValueError); a head that rounding pushes behind its tail is clamped to t; equal values have an order.

    Raises BadInput if n is 1 while rows are longer (nothing could be re-ordered) or a logit is not finite.
    """
    k, n = distances.shape[1], logits.shape[1]
    assert n <= k, f"{n} logits for rows of {k} candidates"
    if n < min(2, k):
        raise BadInput(f"top_n={n} re-orders nothing; use a top_n of at least 2")
    head, order = _sorted_head(distances, _present_logits(distances, logits))
    if n < k:
        head = _before_tail(head, distances[:, n : n + 1])
    return _with_tail(order, k), torch.cat([head, distances[:, n:]], dim=1)


def fuse(
    distances: Float[Tensor, "query k"],
    logits: Float[Tensor, "query n"],
    weight: float,
    temperature: float,
    top_n: int,
    pinned: int = 0,
) -> Reranked:
    """Order the first `top_n` of each row by `weight * distance + logit / temperature`, in float32.

    Ties keep the first stage's order. The tail keeps its own order behind the head: it starts at the head's largest
    value and grows by `weight` times the gaps of the first stage, so that rows stay ascending. Scores of n candidates
    serve every `top_n` up to n; a `top_n` beyond the row length k re-orders the whole row. The first `pinned`
    candidates keep their places: they get the smallest value of their row.

    Raises BadInput for a negative weight, a temperature that is not positive, a `top_n` below 1 or above the number of
    scored candidates, or a logit that is not finite.
    """
    if not weight >= 0:
        raise BadInput(f"weight={weight} would reverse the first stage; use a weight of at least 0")
    if not temperature > 0:
        raise BadInput(f"temperature={temperature} would reverse or void the logits; use a positive one")
    k, n = distances.shape[1], logits.shape[1]
    if top_n < 1 or min(top_n, k) > n:
        raise BadInput(f"top_n={top_n} is not in 1..{n}, the scored candidates per query; score more or lower top_n")
    n = min(top_n, k)
    if n == 0:
        return _with_tail(torch.empty(len(distances), 0, dtype=torch.int64), 0), distances.clone()
    # [query, n]: the new values of the head, ascending.
    fused = weight * distances[:, :n] + _present_logits(distances, logits[:, :n]) / temperature
    if pinned:
        smallest = torch.where(distances[:, :n].isfinite(), fused, torch.inf).amin(dim=1, keepdim=True)
        fused = torch.cat([smallest.expand(-1, min(pinned, n)), fused[:, pinned:]], dim=1)
    head, order = _sorted_head(distances, fused)
    # [query, k - n]: the tail's gaps to the last candidate of the old head, times `weight`, behind the new head.
    gaps = distances[:, n:] - distances[:, n - 1 : n]
    behind = torch.where(distances[:, n:].isfinite(), head[:, -1:] + weight * gaps, torch.inf)
    return _with_tail(order, k), torch.cat([head, behind], dim=1)


def _present_logits(distances: Tensor, logits: Tensor) -> Tensor:
    """The logits in float32, 0 where there is no candidate; all others must be finite."""
    is_present = distances[:, : logits.shape[1]].isfinite()
    bad = (is_present & ~logits.isfinite()).nonzero()
    if len(bad) > 0:
        query, place = bad[0].tolist()
        raise BadInput(
            f"the logit of query row {query}, candidate {place}, is {float(logits[query, place])} "
            f"({len(bad)} such); check the pairwise model's weights or use a higher precision"
        )
    return torch.where(is_present, logits.float(), 0.0)


def _sorted_head(distances: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values ascending (inf where there is no candidate) and their old places; stable."""
    values = torch.where(distances[:, : values.shape[1]].isfinite(), values, torch.inf)
    head, order = values.sort(dim=1, stable=True)
    return head, order


def _before_tail(head: Float[Tensor, "query n"], tail: Float[Tensor, "query 1"]) -> Float[Tensor, "query n"]:
    """OML's scaling of an ascending head whose largest value exceeds the first tail distance."""
    # [query, 1]: the head's largest value; a tail at or below 0 cannot be reached by scaling, only by shifting.
    largest = head[:, -1:]
    scaled = torch.where(tail > 0, head * (tail / largest), head - (largest - tail)) - OML_GAP
    needs = tail.isfinite() & (largest > tail)
    return torch.where(needs, torch.minimum(scaled, tail), head)


def _with_tail(order: Int64[Tensor, "query n"], k: int) -> Int64[Tensor, "query k"]:
    """The order of whole rows: that of the head, then the old positions of the tail."""
    tail = torch.arange(order.shape[1], k, device=order.device).expand(len(order), -1)
    return torch.cat([order, tail], dim=1)
