"""Columns that are computed block by block."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


def join(n_rows: int, parts: Iterable[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
    """The columns of all parts, joined along their first dimension, which comes to `n_rows` in all; {} without parts.

    The whole columns are allocated with the first part and filled. A list of parts would fragment the memory: each part
    that is kept holds a piece of what its block used, the next block then fits nowhere, and the process grows to many
    times what it holds.
    """
    columns: dict[Key, Tensor] = {}
    start = stop = 0
    for part in parts:
        for key, values in part.items():
            if key not in columns:
                columns[key] = torch.empty(n_rows, *values.shape[1:], dtype=values.dtype)
            stop = start + len(values)
            columns[key][start:stop] = values
        start = stop
    assert not columns or start == n_rows, f"{start} rows came of {n_rows}"
    return columns
