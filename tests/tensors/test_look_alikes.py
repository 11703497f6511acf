"""Labels that are taken for one another are in one group; the oracle counts in plain loops."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.look_alikes import connected, look_alike_groups


def random_lists(seed: int) -> tuple[CandidateLists, torch.Tensor]:
    """Lists of 40 of 60 items, some places empty, some items without a label; small numbers make many ties."""
    state = np.random.default_rng(seed)
    labels = torch.from_numpy(state.integers(-1, 30, 60))
    queries = torch.from_numpy(np.sort(state.permutation(60)[:40]))
    items = torch.from_numpy(state.integers(0, 60, (40, 4)))
    items[torch.from_numpy(state.random((40, 4)) < 0.2)] = -1
    return CandidateLists(queries, items, torch.zeros(40, 4)), labels


def groups_in_plain_loops(lists: CandidateLists, labels: torch.Tensor) -> list[set[int]]:
    counted: dict[int, Counter[int]] = {}
    for query, candidates in zip(lists.query_items.tolist(), lists.items.tolist(), strict=True):
        own, worth = int(labels[query]), lists.items.shape[1]
        for item in candidates:
            other = int(labels[item]) if item >= 0 else -1
            if own >= 0 and other >= 0 and other != own:
                counted.setdefault(own, Counter())[other] += worth
                worth -= 1
    groups = [{label} for label in range(int(labels.max()) + 1)]
    for own, others in counted.items():
        joined = min(others, key=lambda other: (-others[other], other))
        first, second = (next(group for group in groups if label in group) for label in (own, joined))
        if first is not second:
            groups.remove(second)
            first |= second
    return groups


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_those_of_plain_loops(seed: int) -> None:
    lists, labels = random_lists(seed)
    groups = look_alike_groups(lists, labels)
    expected = groups_in_plain_loops(lists, labels)
    assert len(expected) > 1
    for group in expected:
        assert {int(groups[label]) for label in group} == {min(group)}


def test_variants_of_one_product_are_a_group_and_labels_never_taken_for_others_are_alone() -> None:
    """Labels 0 to 3 and 4 to 7 lie close together, label 8 far off with more images than a list holds."""
    labels = torch.tensor([*range(8)] * 3 + [8] * 6)
    places = torch.tensor([0.0, 0.1, 0.21, 0.34, 50.0, 50.1, 50.21, 50.34])[labels[:24]]
    points = torch.cat([places + torch.linspace(0, 0.04, 24), torch.linspace(900, 901, 6)])
    distances = (points[:, None] - points).abs().fill_diagonal_(torch.inf)
    distances, items = distances.sort(dim=1, stable=True)
    lists = CandidateLists(torch.arange(30), items[:, :5], distances[:, :5].float())
    assert look_alike_groups(lists, labels).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_lists_of_one_image_hold_no_other_label() -> None:
    lists = CandidateLists(torch.tensor([0, 1]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0))
    assert look_alike_groups(lists, torch.tensor([0, 1])).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_connected_nodes_are_those_of_scipy(seed: int) -> None:
    state = np.random.default_rng(seed)
    n_nodes, n_pairs = 200, int(state.integers(0, 250))
    first, second = state.integers(0, n_nodes, (2, n_pairs))
    found = connected(torch.from_numpy(first), torch.from_numpy(second), n_nodes).numpy()
    graph = coo_matrix((np.ones(n_pairs), (first, second)), shape=(n_nodes, n_nodes))
    component = connected_components(graph, directed=False)[1]
    smallest = np.array([np.flatnonzero(component == number)[0] for number in range(component.max() + 1)])
    assert np.array_equal(found, smallest[component])


def test_a_long_chain_is_connected_whatever_its_order() -> None:
    order = torch.from_numpy(np.random.default_rng(0).permutation(5000))
    assert connected(order[:-1], order[1:], 5000).eq(0).all()
