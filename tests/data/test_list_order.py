"""Lists whose values run the wrong way are told from lists in any other order."""

import numpy as np
import pytest

from distributed_rerank.data.list_order import ListOrder


def is_turned(query: np.ndarray, item: np.ndarray, value: np.ndarray, batch: int) -> bool:
    order = ListOrder(int(max(query.max(), item.max())) + 1)
    for start in range(0, len(query), batch):
        rows = np.arange(start, min(start + batch, len(query)))
        rows = rows[np.argsort(query[rows], kind="stable")]
        order.add(query[rows].astype(np.int32), item[rows].astype(np.int32), value[rows].astype(np.float32))
    return order.is_turned()


@pytest.fixture
def lists() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fifty queries with ten candidates each, none of them a query; distances ascending, with ties."""
    generator = np.random.default_rng(0)
    query = np.repeat(np.arange(50), 10)
    return query, 50 + np.tile(np.arange(10), 50), np.sort(generator.integers(0, 20, (50, 10)), axis=1).ravel() / 7


@pytest.mark.parametrize("batch", [1, 7, 10, 1000])
def test_order_of_the_rows_decides(lists: tuple, batch: int) -> None:
    query, item, value = lists
    assert not is_turned(query, item, value, batch)
    assert is_turned(query, item, -value, batch)
    by_rank = np.argsort(np.tile(np.arange(10), 50), kind="stable")  # all first candidates, all second ones, ...
    assert not is_turned(query[by_rank], item[by_rank], value[by_rank], batch)
    assert is_turned(query[by_rank], item[by_rank], -value[by_rank], batch)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_rows_are_not_turned(lists: tuple, seed: int) -> None:
    query, item, value = (column[np.random.default_rng(seed).permutation(500)] for column in lists)
    assert not is_turned(query, item, value, 64)
    assert not is_turned(query, item, -value, 64)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_query_itself_decides_before_the_order_of_rows(lists: tuple, batch: int) -> None:
    query, item, value = lists
    own = np.arange(50)
    shuffled = np.random.default_rng(1).permutation(550)
    for sign, own_value in ((1, -0.5), (-1, 0.5)):
        columns = (np.append(query, own), np.append(item, own), np.append(sign * value, np.full(50, own_value)))
        for order in (shuffled, np.arange(550), np.arange(550)[::-1]):
            assert is_turned(*(column[order] for column in columns), batch) == (sign < 0)


def test_lists_of_one_value_say_nothing() -> None:
    assert not is_turned(np.array([0, 0, 1]), np.array([2, 3, 2]), np.array([0.5, 0.5, 0.1]), 10)
    assert not ListOrder(3).is_turned()


def odd_one(query: np.ndarray, item: np.ndarray, value: np.ndarray, batch: int) -> int | None:
    order = ListOrder(int(max(query.max(), item.max())) + 1)
    for start in range(0, len(query), batch):
        rows = slice(start, start + batch)
        order.add(query[rows].astype(np.int32), item[rows].astype(np.int32), value[rows].astype(np.float32))
    return order.odd_one()


@pytest.mark.parametrize("batch", [1, 7, 10, 1000])
@pytest.mark.parametrize("others", [[31], [4, 20, 31], [*range(4, 50, 2)]])
def test_lists_that_run_the_other_way_are_found(lists: tuple, batch: int, others: list[int]) -> None:
    query, item, value = lists
    assert odd_one(query, item, value, batch) is None
    mixed = np.where(np.isin(query, others), -value, value)
    assert odd_one(query, item, mixed, batch) == others[0]
    assert odd_one(query, item, -mixed, batch) == others[0]


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_and_short_lists_are_not_odd(lists: tuple, seed: int) -> None:
    query, item, value = lists
    order = np.argsort(query + np.random.default_rng(seed).random(len(query)))  # shuffled within each query
    assert odd_one(query, item[order], value[order], 64) is None
    short = np.tile(np.arange(10), 50) < 4
    mixed = np.where(query % 2, value, -value)
    assert odd_one(query[short], item[short], mixed[short], 64) is None
