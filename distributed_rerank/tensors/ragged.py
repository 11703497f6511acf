"""Rows of different lengths, stored one after another without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix: row r has its `columns`, ascending, and `weights` at offsets[r] .. offsets[r + 1]."""

    offsets: Int64[Tensor, " row_ends"]
    columns: Int64[Tensor, " entry"]
    weights: Float64[Tensor, " entry"]

    def entries_of(self, rows: Int64[Tensor, " row"]) -> tuple[Int64[Tensor, " row"], Int64[Tensor, " entry"]]:
        """Lengths of these rows, and the positions of their entries, row after row."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        return lengths, ranges(starts, lengths)


def concatenate(blocks: Sequence[SparseRows]) -> SparseRows:
    """The rows of all blocks, in the order of the blocks."""
    lengths = torch.cat([block.offsets.diff() for block in blocks])
    columns = torch.cat([block.columns for block in blocks])
    return SparseRows(offsets_of(lengths), columns, torch.cat([block.weights for block in blocks]))


def offsets_of(lengths: Int64[Tensor, " row"]) -> Int64[Tensor, " row_ends"]:
    """Position of each row's first entry, then the total: lengths [2, 0, 3] give [0, 2, 2, 5]."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def places_in_rows(rows: Int64[Tensor, " entry"], lengths: Int64[Tensor, " row"]) -> Int64[Tensor, " entry"]:
    """Place of each entry within its row: rows [0, 0, 2, 2, 2] of lengths [2, 0, 3] give [0, 1, 0, 1, 2]."""
    return torch.arange(len(rows), device=rows.device) - offsets_of(lengths)[rows]


def ranges(starts: Int64[Tensor, " row"], lengths: Int64[Tensor, " row"]) -> Int64[Tensor, " entry"]:
    """The numbers start .. start + length of each row, row after row: ([7, 3], [2, 1]) give [7, 8, 3]."""
    # Counting 0, 1, 2, ... through all rows is right up to a constant per row.
    shift = (starts - offsets_of(lengths)[:-1]).repeat_interleave(lengths)
    return torch.arange(len(shift), device=starts.device) + shift


def row_sums(values: Float64[Tensor, " entry"], lengths: Int64[Tensor, " row"]) -> Float64[Tensor, " row"]:
    """Sum of each row's values, added from first to last so that the bits are always the same."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
