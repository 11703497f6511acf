"""Which pairs may be among the nearest neighbours: a fast product with an error bound rules out all others.

One block of queries meets one slice of the gallery. (1) One matrix product gives an approximate squared distance for
every pair: in bfloat16 where a CPU multiplies it natively, in float32 elsewhere. (2) The columns are cut into groups.
The n-th smallest group minimum of a row is the entry of some item, and n - 1 other items have entries no larger, so a
true neighbour's entry exceeds it by at most twice the error bound (module `distances`). (3) All pairs up to that bound
are kept, however many there are. Where bfloat16 would keep too many, float32 chooses again.
"""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int64
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.distances import (
    Rounded,
    relative_squared_error,
    relative_squared_tile,
    rounded_error,
    rounded_gallery,
    squared_norms,
)
from distributed_rerank.tensors.ragged import ranges
from distributed_rerank.tensors.sharding import blocks

LARGEST_SQUARED_NORM = 2.0**120
LARGEST_GROUP = 32
BF16_ROUNDING = 2.0**-8 * (1 + 2.0**-10)
"""Rounding a number to bfloat16, which has 8 bits, changes it by at most this part of itself."""
MOST_KEPT = 4
"""Groups per neighbour that a bfloat16 product may keep before float32 chooses instead."""

Pairs = tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]
"""Rows (queries of the block) and columns (gallery items of the slice)."""


@dataclass(frozen=True)
class Side:
    """Queries or gallery items, with the numbers that the search needs about each."""

    embeddings: Float[Tensor, "item dim"]
    items: Int64[Tensor, " item"]
    sequences: Int64[Tensor, " item"] | None
    norms: Float[Tensor, " item"]
    rounded: Rounded | None = None

    def __getitem__(self, rows: slice | Int64[Tensor, " row"]) -> "Side":
        """These rows only."""
        sequences = None if self.sequences is None else self.sequences[rows]
        rounded = None if self.rounded is None else Rounded(self.rounded.factors[rows], self.rounded.residuals[rows])
        return Side(self.embeddings[rows], self.items[rows], sequences, self.norms[rows], rounded)


def checked_side(embeddings: Tensor, items: Tensor, sequences: Tensor | None) -> Side:
    """A `Side` with norms in float64. Raises BadInput for an embedding that is not finite or too long."""
    squared = squared_norms(embeddings)
    # Negated, because NaN compares false with everything. Longer rows would overflow float32 when squared.
    bad = (~(squared < LARGEST_SQUARED_NORM)).nonzero()
    if len(bad) > 0:
        item = int(items[bad[0, 0]])
        raise BadInput(
            f"the embedding of item {item} is not finite or longer than 2^60 ({len(bad)} such); "
            "embed it again or remove it from the catalogue"
        )
    sequences = None if sequences is None else sequences.contiguous()
    return Side(embeddings, items.contiguous(), sequences, squared.sqrt())


def sorted_by_item(gallery: Side) -> Side:
    """The gallery in ascending order of item numbers, which must be distinct; copied only if it is not sorted."""
    if bool((gallery.items.diff() <= 0).any()):
        gallery = gallery[gallery.items.argsort()]
        assert not bool((gallery.items.diff() == 0).any()), "an item occurs twice in one gallery tile"
    return gallery


def rounded_slice(gallery: Side, n_items: int) -> Rounded:
    """A slice of the gallery as the right factor of a bfloat16 product, filled up to whole groups of rows."""
    group = _group_size(len(gallery.items), n_items)
    n_rows = -(-len(gallery.items) // group) * group
    return rounded_gallery(gallery.embeddings, gallery.norms.square().float(), n_rows)


def candidate_pairs(
    queries: Side, gallery: Side, reach: Float[Tensor, " query"], n_items: int, workspace: Tensor
) -> Pairs:
    """All pairs that may be among the `n_items` nearest of their query, rows ascending, then columns.

    `gallery` is sorted by item. `reach` is the distance of each query's n-th nearest item so far, inf where there are
    fewer: pairs that are surely further are left out. The product is written into `workspace`, which has room for
    float32 entries of all pairs and of one more group per query.
    """
    pairs = None if gallery.rounded is None else _pairs_by_rounded(queries, gallery, reach, n_items, workspace)
    return _pairs_by_float32(queries, gallery, reach, n_items, workspace) if pairs is None else pairs


def _pairs_by_float32(
    queries: Side, gallery: Side, reach: Float[Tensor, " query"], n_items: int, workspace: Tensor
) -> Pairs:
    """`candidate_pairs` by a float32 product."""
    n_queries, n_gallery = len(queries.items), len(gallery.items)
    group = _group_size(n_gallery, n_items)
    n_groups = -(-n_gallery // group)
    # [query, column]: one column per gallery item, and columns of inf up to a whole number of groups.
    table = workspace[: n_queries * n_groups * group].view(n_queries, n_groups * group)
    table[:, n_gallery:] = torch.inf
    relative_squared_tile(queries.embeddings, gallery.embeddings, gallery.norms.square().float(), table[:, :n_gallery])
    # No bound is as high as inf, so these pairs are never kept.
    table[_excluded_pairs(queries, gallery)] = torch.inf
    # [query]: an entry lies at most this far from |g|^2 - 2 q.g.
    error = relative_squared_error(queries.norms.square(), float(gallery.norms.max()), queries.embeddings.shape[1])
    # [query, group]: the smallest entry of each group of neighbouring columns.
    minima = table.view(n_queries, n_groups, group).amin(dim=2)
    bound = _bound(minima, reach, n_items, queries, error)
    # Single entries are only looked at in groups whose minimum is within the bound: a few per neighbour.
    rows, groups = (minima <= bound[:, None]).nonzero(as_tuple=True)
    return _entries_up_to(table, group, rows, groups, bound)


def _pairs_by_rounded(
    queries: Side, gallery: Side, reach: Float[Tensor, " query"], n_items: int, workspace: Tensor
) -> Pairs | None:
    """`candidate_pairs` by a bfloat16 product; None where it would keep too many, as among near-duplicates."""
    assert queries.rounded is not None, "both sides are rounded"
    assert gallery.rounded is not None, "both sides are rounded"
    # The factors hold the norms as extra columns, and `rounded_slice` filled up the groups: one product is the whole
    # table [query, column], with inf in the filling columns. Its entries take half of the workspace.
    n_queries, n_columns = len(queries.items), len(gallery.rounded.factors)
    table = workspace.view(torch.bfloat16)[: n_queries * n_columns].view(n_queries, n_columns)
    torch.mm(queries.rounded.factors, gallery.rounded.factors.t(), out=table)
    table[_excluded_pairs(queries, gallery)] = torch.inf
    # [query]: an entry lies at most this far from |g|^2 - 2 q.g, before it was itself rounded to bfloat16.
    error = rounded_error(
        queries.norms.square(), float(gallery.norms.max()), queries.embeddings.shape[1],
        queries.rounded.residuals, float(gallery.rounded.residuals.max()),
    )  # fmt: skip
    # From here as in float32: minima [query, group], bound [query], the groups within it, their entries within it.
    group = _group_size(len(gallery.items), n_items)
    minima = _minima_as_float32(table, group)
    bound = _bound(minima, reach, n_items, queries, error, BF16_ROUNDING)
    rows, groups = (minima <= bound[:, None]).nonzero(as_tuple=True)
    if len(rows) > MOST_KEPT * n_items * n_queries:
        return None
    return _entries_up_to(table, group, rows, groups, bound)


def _minima_as_float32(table: BFloat16[Tensor, "query column"], group: int) -> Float32[Tensor, "query group"]:
    """The smallest entry of each group, a few rows at a time in float32: torch has no fast minimum of bfloat16."""
    out = torch.empty(len(table), table.shape[1] // group, device=table.device)
    for start, stop in blocks(len(table), 8):
        torch.amin(table[start:stop].float().view(stop - start, -1, group), dim=2, out=out[start:stop])
    return out


def _bound(
    minima: Float32[Tensor, "query group"],
    reach: Float[Tensor, " query"],
    n_items: int,
    queries: Side,
    error: Float64[Tensor, " query"],
    rounding: float = 0.0,
) -> Float32[Tensor, " query"]:
    """The largest entry that a true neighbour of each query can have.

    `error` is the largest error of an entry before the entry itself was rounded, by up to the part `rounding` of
    itself.
    """
    # [query] From earlier slices: a neighbour is no further than `reach`, so its |g|^2 - 2 q.g, the squared distance
    # less |q|^2, is at most reach^2 - |q|^2. The factors cover rounding: a distance that rounds to at most `reach` in
    # float32 has a true square of at most reach^2 (1 + 2^-24)^2, and |q|^2 is a sum in float64.
    bound = reach.double().square() * (1 + 2.0**-22) - queries.norms.square() * (1 - 2.0**-40) + error
    if not bool(bound.isfinite().all()) and minima.shape[1] >= n_items:
        # [query] From this slice, where earlier ones gave some query fewer than n items: n items have entries up to the
        # n-th smallest minimum, hence true values up to that + error; a neighbour's true value is no larger, and its
        # entry is at most one more error above.
        nth_minimum = minima.topk(n_items, dim=1, largest=False, sorted=False).values.amax(dim=1).double()
        bound = torch.minimum(bound, _rounded_up(nth_minimum, rounding) + 2 * error)
    # Entries in the table are rounded. Rounding keeps their order, so comparing with the bound rounded up is safe.
    bound = _rounded_up(bound, rounding).clamp(max=torch.finfo(torch.float32).max).float()
    # One float32 up, since the conversion may have rounded down. Finite, so that entries of inf stay above it.
    return torch.nextafter(bound, torch.full_like(bound, torch.inf)).clamp_(max=torch.finfo(torch.float32).max)


def _rounded_up(values: Float64[Tensor, " query"], rounding: float) -> Float64[Tensor, " query"]:
    """The values, made finite, plus the part `rounding` of themselves."""
    values = values.clamp(max=torch.finfo(torch.float32).max)
    return values + values.abs() * rounding


def _group_size(n_gallery: int, n_items: int) -> int:
    """Columns per group: as many as leave clearly more groups than neighbours, at most two cache lines."""
    group = LARGEST_GROUP
    while group > 1 and n_gallery < 4 * n_items * group:
        group //= 2
    return group


def _entries_up_to(
    table: Float[Tensor, "query column"],
    group: int,
    rows: Int64[Tensor, " chosen"],
    groups: Int64[Tensor, " chosen"],
    bound: Float32[Tensor, " query"],
) -> Pairs:
    """Rows and columns, ascending, of all entries of the chosen groups that do not exceed the bound of their row."""
    n_groups = table.shape[1] // group
    # [chosen, group]: the table as one row per group, of which the chosen ones are copied out.
    values = table.view(-1, group).index_select(0, rows * n_groups + groups).float()
    # [pair]: in which chosen group an entry is, and where in it.
    chosen, offset = (values <= bound[rows][:, None]).nonzero(as_tuple=True)
    return rows[chosen], groups[chosen] * group + offset


def _excluded_pairs(queries: Side, gallery: Side) -> Pairs:
    """The pairs of an item with itself and of items of one sequence; a pair may occur twice."""
    # [query]: where the query's own item would stand among the gallery's ascending items; kept where it does stand.
    columns = torch.searchsorted(gallery.items, queries.items).clamp_(max=len(gallery.items) - 1)
    rows = (gallery.items[columns] == queries.items).nonzero()[:, 0]
    columns = columns[rows]
    if queries.sequences is None or gallery.sequences is None:
        return rows, columns
    # Gallery columns ordered by sequence: a query's sequence is one run of them, starting at `first` [query] and
    # `n_same` [query] long; none where the query has no sequence (-1).
    by_sequence, order = gallery.sequences.sort(stable=True)
    first = torch.searchsorted(by_sequence, queries.sequences)
    n_same = torch.searchsorted(by_sequence, queries.sequences, right=True) - first
    n_same[queries.sequences < 0] = 0
    # [pair]: all columns of all runs.
    same_rows = torch.arange(len(n_same), device=rows.device).repeat_interleave(n_same)
    same_columns = order[ranges(first, n_same)]
    return torch.cat([rows, same_rows]), torch.cat([columns, same_columns])
