"""Values of pairs are found by pair, whatever the order in which they came."""

import pytest
import torch

from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.pair_values import PairValues


def test_values_are_those_of_the_pairs_and_nan_for_others() -> None:
    known = PairValues(torch.tensor([2, 13, 31]), torch.tensor([0.5, -1.0, 2.0]), 10)
    found = known.look_up(torch.tensor([3, 0, 1]), torch.tensor([1, 3, 3]))
    assert found.nan_to_num(9.0).tolist() == [2.0, 9.0, -1.0]


@pytest.mark.parametrize("is_some", [False, True])
def test_every_listed_pair_is_found_as_a_dictionary_finds_it(is_some: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randperm(12, generator=generator)[:8]
    items = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in queries])
    items[2, 3:] = -1
    values = torch.randn(items.shape, generator=generator)
    lists = CandidateLists(queries, items, values.abs().sort(dim=1).values)
    has_value = (items >= 0) & (values > 0) if is_some else None
    known = PairValues.of_lists(lists, values, 12, has_value)
    by_pair = {
        (query, item): value
        for query, row, of_row, counts in zip(
            queries.tolist(), items.tolist(), values.tolist(), (values > 0).tolist(), strict=True
        )
        for item, value, is_counted in zip(row, of_row, counts, strict=True)
        if item >= 0 and (is_counted or not is_some)
    }
    assert len(known) == len(by_pair)
    asked = torch.cartesian_prod(torch.arange(12), torch.arange(-1, 12))
    found = known.look_up(asked[:, 0], asked[:, 1]).nan_to_num(99.0).tolist()
    expected = [by_pair.get((query, item), 99.0) for query, item in asked.tolist()]
    assert found == pytest.approx(expected)


def test_no_pair_at_all_has_no_value() -> None:
    nothing = PairValues(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 4)
    assert nothing.look_up(torch.tensor([[0, 1]]), torch.tensor([[1, 2]])).isnan().all()
