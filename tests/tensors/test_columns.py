"""Columns that come in parts."""

import pytest
import torch

from distributed_rerank.tensors.columns import join


def test_join_is_concatenation_of_each_column() -> None:
    whole = {"a": torch.arange(7), "b": torch.rand(7, 2, dtype=torch.float64), "c": torch.arange(7) > 3}
    parts = ({name: column[start : start + 3] for name, column in whole.items()} for start in range(0, 7, 3))
    found = join(7, parts)
    assert list(found) == list(whole)
    assert all(torch.equal(found[name], column) and found[name].dtype == column.dtype for name, column in whole.items())
    assert join(0, []) == {}


def test_join_parts_that_do_not_come_to_all_rows_are_an_error() -> None:
    with pytest.raises(AssertionError, match="3 rows came of 4"):
        join(4, [{"a": torch.zeros(3)}])
