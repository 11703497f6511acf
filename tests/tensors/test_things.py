"""Photos of one thing as one result, against literal definitions."""

import math

import numpy as np
import pytest
import torch

from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.things import by_thing, count_relevant_things


def literal(items: list[int], p: list[float], things: list[int], combination: str) -> list[tuple]:
    """(thing, view, number of views, value) of each thing in the order wanted."""
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        if item >= 0:
            groups.setdefault(things[item], []).append(place)
    rows = []
    for thing, places in groups.items():
        known = [p[place] for place in places if not math.isnan(p[place])]
        rules = {"best": max, "mean": np.mean, "noisy_or": lambda ps: 1 - np.prod([1 - x for x in ps])}
        value = rules[combination](known) if known else math.nan
        rank = 0 if combination == "best" else -(-1 if math.isnan(value) else value)
        rows.append((rank, places[0], thing, items[places[0]], len(places), value))
    return [row[2:] for row in sorted(rows, key=lambda row: row[:2])]


@pytest.mark.parametrize("combination", ["best", "noisy_or", "mean"])
def test_by_thing_random_lists_equal_the_literal_definition(combination) -> None:
    rng = np.random.default_rng(0)
    things = rng.integers(6, size=20)
    items = np.stack([rng.permutation(20)[:9] for _ in range(30)])
    p = rng.random((30, 9))
    p[:, 6:] = np.nan  # behind the pairwise step's top_n
    items[rng.random((30, 9)) < 0.2] = -1
    lists = CandidateLists(torch.arange(30), torch.from_numpy(items), torch.zeros(30, 9))
    found = by_thing(lists, torch.from_numpy(p), torch.from_numpy(things), combination)
    for row in range(30):
        wanted = literal(items[row].tolist(), p[row].tolist(), things.tolist(), combination)
        n = len(wanted)
        assert found.things[row, :n].tolist() == [thing for thing, *_ in wanted]
        assert found.views[row, :n].tolist() == [view for _, view, *_ in wanted]
        assert found.n_views[row, :n].tolist() == [number for *_, number, _ in wanted]
        values = np.array([value for *_, value in wanted])
        np.testing.assert_allclose(found.probabilities[row, :n].numpy(), values, rtol=1e-12, equal_nan=True)
        assert (found.things[row, n:] == -1).all()
        assert (found.views[row, n:] == -1).all()


def test_by_thing_without_probabilities_keeps_the_order_of_first_photos() -> None:
    lists = CandidateLists(torch.tensor([7]), torch.tensor([[3, 0, 1, 2]]), torch.zeros(1, 4))
    found = by_thing(lists, None, torch.tensor([0, 1, 0, 1, 2, 2, 2, 2]), "noisy_or")
    assert found.things.tolist() == [[1, 0]]
    assert found.views.tolist() == [[3, 0]]
    assert found.probabilities.isnan().all()


def test_by_thing_no_candidate_at_all_is_an_empty_list() -> None:
    lists = CandidateLists(torch.tensor([0, 1]), torch.full((2, 3), -1), torch.full((2, 3), torch.inf))
    assert by_thing(lists, None, torch.tensor([0, 1]), "best").things.shape == (2, 0)


@pytest.mark.parametrize("seed", range(6))
def test_count_relevant_things_random_catalogue_equals_the_literal_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    things = rng.integers(12, size=40)
    labels = rng.integers(-1, 5, size=12)[things]
    sequences = rng.integers(-1, 6, size=40) if seed % 2 else np.full(40, -1)
    gallery, queries = np.sort(rng.permutation(40)[:25]), np.sort(rng.permutation(40)[:30])
    tensors = (torch.from_numpy(codes) for codes in (queries, gallery, labels, sequences, things))
    wanted = []
    for query in queries:
        seen = {
            things[item]
            for item in gallery
            if item != query
            and labels[item] == labels[query] >= 0
            and not (sequences[query] >= 0 and sequences[item] == sequences[query])
        }
        wanted.append(len(seen))
    assert count_relevant_things(*tensors).tolist() == wanted
