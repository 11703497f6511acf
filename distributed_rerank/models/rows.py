"""Linear layers whose rows have the same bits whatever other rows are in the batch.

A CPU's matrix product takes the last rows of a matrix, which fill no tile, by other instructions than the rest, so
their sums are rounded in another order. Padded to whole tiles, every row goes the same way: a logit is then the same
for one pair online and for the same pair among thousands in a batch job.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_OF_A_TILE = 16


def in_whole_tiles(function: Callable[[Tensor], Tensor], x: Float[Tensor, "*row channel"]) -> Float[Tensor, "..."]:
    """`function` of each row, computed on a number of rows that fills whole tiles; as it is while gradients flow."""
    n_rows = x.shape[:-1].numel()
    missing = -n_rows % ROWS_OF_A_TILE
    if missing == 0 or torch.is_grad_enabled():
        return function(x)
    y = function(torch.nn.functional.pad(x.reshape(n_rows, -1), (0, 0, 0, missing)))[:n_rows]
    return y.unflatten(0, x.shape[:-1])
