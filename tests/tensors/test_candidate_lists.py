"""Candidate lists: parts of them, without a copy where none is needed."""

import numpy as np
import torch

from distributed_rerank.tensors.candidate_lists import CandidateLists, Ranking, concatenate, empty_lists

INF = float("inf")
LISTS = CandidateLists(
    torch.tensor([1, 4]), torch.tensor([[0, 2, 5], [3, -1, -1]]), torch.tensor([[1.0, 2.0, 3.0], [1.0, INF, INF]])
)


def test_arrays_and_first_candidates_share_the_memory_of_the_lists() -> None:
    items = np.array([[0, 2], [3, -1]])
    lists = CandidateLists.from_arrays(np.array([1, 4]), items, np.array([[1, 2], [1, INF]], np.float32))
    lists.items[0, 0] = 7
    assert items[0, 0] == 7
    assert np.shares_memory(lists.first(1).arrays()[1], items)
    assert lists.first(1).items.tolist() == [[7], [3]]


def test_lists_of_queries_without_one_are_empty() -> None:
    found = LISTS.of_queries(torch.tensor([6, 1, 2, 4]))
    assert found.query_items.tolist() == [6, 1, 2, 4]
    assert found.items.tolist() == [[-1, -1, -1], [0, 2, 5], [-1, -1, -1], [3, -1, -1]]
    assert found.distances.tolist() == [[INF, INF, INF], [1, 2, 3], [INF, INF, INF], [1, INF, INF]]
    nobody = empty_lists(torch.empty(0, dtype=torch.int64), 2)
    assert nobody.of_queries(torch.tensor([1, 2])).items.tolist() == [[-1, -1], [-1, -1]]


def test_without_moves_up_what_is_behind_and_tells_where_it_was() -> None:
    found, columns = LISTS.without(torch.tensor([[True, False, False], [False, True, True]]))
    assert found.items.tolist() == [[2, 5, -1], [3, -1, -1]]
    assert found.distances.tolist() == [[2, 3, INF], [1, INF, INF]]
    assert columns.tolist() == [[1, 2, 0], [0, 1, 2]]
    nothing, _ = LISTS.without(torch.ones(2, 3, dtype=torch.bool))
    assert nothing.items.tolist() == [[-1, -1, -1], [-1, -1, -1]]


def test_concatenated_parts_are_the_whole_again() -> None:
    joined = concatenate([LISTS[:1].padded(5), LISTS[torch.tensor([1])].padded(5)])
    assert torch.equal(joined.query_items, LISTS.query_items)
    assert torch.equal(joined.items[:, :3], LISTS.items)
    assert joined.items[:, 3:].unique().tolist() == [-1]
    assert joined.distances[:, 3:].unique().tolist() == [INF]
    assert len(joined) == 2


def test_lists_are_a_ranking_of_their_own_rows() -> None:
    assert isinstance(LISTS, Ranking)
    assert LISTS[torch.tensor([1, 0])].items[:, 0].tolist() == [3, 0]
