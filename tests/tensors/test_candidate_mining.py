"""Filters, draws, statistics and suspects against literal loops over small candidate lists."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_rerank.config.training import NegativeFilters
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.tensors.candidate_mining import draw_lists, filter_negatives, suspected_mislabels
from distributed_rerank.tensors.knn import nearest
from distributed_rerank.tensors.mining_statistics import mining_statistics


def training_set(seed: int, n: int = 60) -> tuple[CandidateLists, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 9, (n,), generator=generator)
    sequences = torch.randint(-1, 20, (n,), generator=generator)
    embeddings = torch.randn(10, 4, generator=generator)[labels] + 0.8 * torch.randn(n, 4, generator=generator)
    anchors = torch.randperm(n, generator=generator)[:40]
    found = nearest(
        embeddings[anchors],
        embeddings,
        query_items=anchors,
        gallery_items=torch.arange(n),
        query_sequences=sequences[anchors],
        gallery_sequences=sequences,
        n_items=12,
    )
    return found, anchors, labels, sequences


def literal_filter(
    found: CandidateLists, anchors: Tensor, labels: Tensor, filters: NegativeFilters
) -> tuple[list[list[int]], dict[str, int]]:
    dropped: dict[str, int] = dict.fromkeys(
        ("absolute_margin", "relative_margin", "min_distance", "range_min", "range_max"), 0
    )
    rows = []
    for row, anchor in enumerate(anchors.tolist()):
        pairs = [(i, float(d)) for i, d in zip(found.items[row].tolist(), found.distances[row], strict=True) if i >= 0]
        label = int(labels[anchor])
        positives = [d for i, d in pairs if label >= 0 and labels[i] == label]
        left = [(i, d) for i, d in pairs if label >= 0 and labels[i] >= 0 and labels[i] != label]
        furthest = max(positives, default=float("inf"))
        bounds = {
            "absolute_margin": None if filters.absolute_margin is None else furthest + filters.absolute_margin,
            "relative_margin": None if filters.relative_margin is None else furthest * (1 + filters.relative_margin),
            "min_distance": filters.min_distance,
        }
        for name, bound in bounds.items():
            if bound is not None:
                dropped[name] += sum(d < bound for _, d in left)
                left = [(i, d) for i, d in left if d >= bound]
        stop = len(left) if filters.range_max is None else filters.range_max
        dropped["range_min"] += len(left[: filters.range_min])
        dropped["range_max"] += len(left[stop:])
        rows.append([i for i, _ in left[filters.range_min : stop]])
    return rows, dropped


@pytest.mark.parametrize(
    "filters",
    [
        NegativeFilters(),
        NegativeFilters(range_min=2, range_max=5),
        NegativeFilters(absolute_margin=-1.5),
        NegativeFilters(relative_margin=-0.5, range_max=3),
        NegativeFilters(min_distance=1.0, range_min=1),
        NegativeFilters(absolute_margin=-1.5, relative_margin=-0.4, min_distance=1.1, range_min=1, range_max=4),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_filter_negatives_matches_a_loop_and_counts_each_candidate_once(filters: NegativeFilters, seed: int) -> None:
    found, anchors, labels, _ = training_set(seed)
    allowed, dropped = filter_negatives(found, labels, filters)
    rows, expected = literal_filter(found, anchors, labels, filters)
    assert [found.items[r][allowed[r]].tolist() for r in range(len(anchors))] == rows
    assert dropped == {name: count for name, count in expected.items() if name in dropped}
    assert all(count == 0 for name, count in expected.items() if name not in dropped)
    statistics = mining_statistics(found, labels, allowed, dropped)
    assert statistics.n_negatives - sum(dropped.values()) == statistics.negative_distances.n == sum(map(len, rows))


def test_mining_statistics_match_a_loop() -> None:
    found, anchors, labels, _ = training_set(3)
    allowed, dropped = filter_negatives(found, labels, NegativeFilters(min_distance=1.0, range_max=4))
    statistics = mining_statistics(found, labels, allowed, dropped)
    positives, hardest_used, with_negative, without_positive, without_negative = [], 0, 0, 0, 0
    for row, anchor in enumerate(anchors.tolist()):
        own = int(labels[anchor])
        kinds = [int(labels[i]) if i >= 0 and own >= 0 else -1 for i in found.items[row].tolist()]
        mine = [float(found.distances[row, c]) for c, kind in enumerate(kinds) if kind >= 0 and kind == own]
        others = [c for c, kind in enumerate(kinds) if kind >= 0 and kind != own]
        positives += mine
        without_positive += not mine
        without_negative += not allowed[row].any()
        with_negative += bool(others)
        hardest_used += bool(others) and bool(allowed[row, others[0]])
    assert statistics.positive_distances.n == len(positives)
    assert statistics.positive_distances.mean == pytest.approx(np.mean(positives))
    assert statistics.positive_distances.median == pytest.approx(np.median(positives))
    assert statistics.positive_distances.smallest == min(positives)
    assert statistics.positive_distances.largest == max(positives)
    assert (statistics.n_without_positive, statistics.n_without_negative) == (
        without_positive,
        without_negative,
    )
    assert statistics.share_of_hardest_used == pytest.approx(hardest_used / with_negative)
    assert statistics.n_candidates == int((found.items >= 0).sum())


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("beyond_share", [0.0, 0.5, 1.0])
def test_draw_lists_draws_every_possible_member_and_no_other(beyond_share: float, temperature: float | None) -> None:
    found, anchors, labels, sequences = training_set(4)
    allowed, _ = filter_negatives(found, labels, NegativeFilters(range_max=4))
    generator = torch.Generator().manual_seed(0)
    seen: dict[int, set[int]] = {row: set() for row in range(len(anchors))}
    rows: set[int] = set()
    for _ in range(300):
        lists = draw_lists(
            found,
            labels,
            allowed,
            n_negatives=2,
            generator=generator,
            beyond_share=beyond_share,
            temperature=temperature,
            sequences=sequences,
        )
        rows = set(lists.rows.tolist())
        for row, items in zip(lists.rows.tolist(), lists.items.tolist(), strict=True):
            seen[row].add(items[0])
            choice = found.items[row][allowed[row]].tolist()
            assert set(items[1:]) <= set(choice)
            assert len(set(items[1:])) == min(2, len(choice))
    for row, anchor in enumerate(anchors.tolist()):
        listed = set(found.items[row].tolist())
        same = {i for i in range(len(labels)) if labels[i] == labels[anchor] and i != anchor and labels[anchor] >= 0}
        inside = same & listed
        beyond = {i for i in same - listed if sequences[i] < 0 or sequences[i] != sequences[anchor]}
        expected = {0.0: inside or beyond, 0.5: inside | beyond, 1.0: beyond or inside}[beyond_share]
        if not bool(allowed[row].any()):
            expected = set()
        assert seen[row] == expected
        assert (row in rows) == bool(expected)


def test_draw_lists_same_seed_gives_the_same_lists_and_another_seed_others() -> None:
    found, _, labels, _ = training_set(5)
    allowed, _ = filter_negatives(found, labels, NegativeFilters())

    def items(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw_lists(found, labels, allowed, n_negatives=3, generator=generator, beyond_share=0.3).items

    assert torch.equal(items(0), items(0))
    assert not torch.equal(items(0), items(1))


def test_draw_lists_temperature_draws_in_proportion_to_exp_of_minus_distance() -> None:
    distances = torch.tensor([[0.1, 0.2, 0.5, 1.0]])
    found = CandidateLists(torch.tensor([0]), torch.tensor([[1, 2, 3, 4]]), distances)
    labels = torch.tensor([0, 0, 1, 2, 3])
    allowed = torch.tensor([[False, True, True, True]])
    repeat = 20_000
    many = found[torch.zeros(repeat, dtype=torch.int64)]
    lists = draw_lists(
        many,
        labels,
        allowed.expand(repeat, -1),
        n_negatives=1,
        generator=torch.Generator().manual_seed(0),
        temperature=0.5,
    )
    shares = torch.bincount(lists.items[:, 1], minlength=5)[2:] / repeat
    torch.testing.assert_close(shares, torch.softmax(-distances[0, 1:] / 0.5, dim=0), atol=0.015, rtol=0)


def test_suspected_mislabels_matches_a_loop_each_pair_once() -> None:
    found, anchors, labels, _ = training_set(6)
    expected = {}
    for row, anchor in enumerate(anchors.tolist()):
        for item, distance in zip(found.items[row].tolist(), found.distances[row].tolist(), strict=True):
            if (
                item >= 0
                and min(labels[item], labels[anchor]) >= 0
                and labels[item] != labels[anchor]
                and distance <= 1.2
            ):
                expected[min(item, anchor), max(item, anchor)] = distance
    pairs, distances = suspected_mislabels(found, labels, max_distance=1.2)
    ordered = sorted(expected.items(), key=lambda entry: (entry[1], entry[0]))
    assert len(ordered) > 5
    assert [tuple(pair) for pair in pairs.tolist()] == [pair for pair, _ in ordered]
    assert distances.tolist() == [distance for _, distance in ordered]


@pytest.mark.parametrize(("low", "high"), [(-1, None), (3, 3), (4, 2)])
def test_negative_filters_empty_range_is_bad_input(low: int, high: int | None) -> None:
    with pytest.raises(BadInput, match=f"range_min={low}"):
        NegativeFilters(range_min=low, range_max=high)
