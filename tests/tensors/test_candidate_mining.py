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
    found, anchors, labels, sequences, _ = training_set_with_embeddings(seed, n)
    return found, anchors, labels, sequences


def training_set_with_embeddings(seed: int, n: int = 60) -> tuple[CandidateLists, Tensor, Tensor, Tensor, Tensor]:
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
    return found, anchors, labels, sequences, embeddings


def literal_filter(
    found: CandidateLists,
    anchors: Tensor,
    labels: Tensor,
    filters: NegativeFilters,
    embeddings: np.ndarray,
    sequences: Tensor,
) -> tuple[list[list[int]], dict[str, int]]:
    dropped: dict[str, int] = dict.fromkeys(
        ("absolute_margin", "relative_margin", "min_distance", "range_min", "range_max"), 0
    )
    rows = []
    for row, anchor in enumerate(anchors.tolist()):
        pairs = [(i, float(d)) for i, d in zip(found.items[row].tolist(), found.distances[row], strict=True) if i >= 0]
        label = int(labels[anchor])
        left = [(i, d) for i, d in pairs if label >= 0 and labels[i] >= 0 and labels[i] != label]
        positives = [
            i
            for i in range(len(labels))
            if i != anchor and labels[i] == label and not (0 <= sequences[i] == sequences[anchor])
        ]

        def cosine(item: int, anchor: int = anchor) -> float:
            one, other = embeddings[anchor].astype(np.float64), embeddings[item].astype(np.float64)
            return float(one @ other / np.sqrt((one @ one) * (other @ other)))

        least = min(map(cosine, positives), default=float("inf"))
        for name in ("absolute_margin", "relative_margin", "min_distance"):
            value = getattr(filters, name)
            if value is not None:
                drops = {
                    "absolute_margin": lambda i, d, v=value, c=cosine, low=least: c(i) + v > low,
                    "relative_margin": lambda i, d, v=value, c=cosine, low=least: c(i) > low - v * abs(low),
                    "min_distance": lambda i, d, v=value: d < v,
                }[name]
                dropped[name] += sum(drops(i, d) for i, d in left)
                left = [(i, d) for i, d in left if not drops(i, d)]
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
        NegativeFilters(absolute_margin=0.0),
        NegativeFilters(absolute_margin=-0.4),
        NegativeFilters(relative_margin=0.05, range_max=3),
        NegativeFilters(min_distance=1.0, range_min=1),
        NegativeFilters(absolute_margin=-0.5, relative_margin=-0.4, min_distance=1.1, range_min=1, range_max=4),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_filter_negatives_matches_a_loop_and_counts_each_candidate_once(filters: NegativeFilters, seed: int) -> None:
    found, anchors, labels, sequences, embeddings = training_set_with_embeddings(seed)
    allowed, dropped = filter_negatives(found, labels, filters, embeddings, sequences)
    rows, expected = literal_filter(found, anchors, labels, filters, embeddings.numpy(), sequences)
    assert [found.items[r][allowed[r]].tolist() for r in range(len(anchors))] == rows
    assert dropped == {name: count for name, count in expected.items() if name in dropped}
    assert all(count == 0 for name, count in expected.items() if name not in dropped)
    statistics = mining_statistics(found, labels, allowed, dropped)
    assert statistics.n_negatives - sum(dropped.values()) == statistics.negative_distances.n == sum(map(len, rows))


PEER: dict[NegativeFilters, tuple[int, ...]] = {
    NegativeFilters(absolute_margin=0.2): (
        17, 13, 9, 20, 16, 20, 11, 21, 8, 2, 21, 8, 20, 23, 23, 21, 17, 21, 18, 24, 19, 18, 19, 9, 22, 20, 14, 4, 21,
        14, 23, 21,
    ),
    NegativeFilters(absolute_margin=-0.2): (
        27, 26, 24, 26, 24, 27, 23, 25, 19, 7, 26, 11, 26, 27, 27, 27, 27, 27, 26, 27, 27, 26, 27, 24, 24, 25, 24, 13,
        27, 24, 27, 27,
    ),
    NegativeFilters(relative_margin=0.05): (
        20, 20, 19, 25, 19, 23, 16, 23, 14, 5, 25, 9, 22, 25, 26, 25, 23, 25, 22, 26, 22, 22, 22, 16, 23, 24, 19, 7,
        22, 21, 25, 25,
    ),
    NegativeFilters(relative_margin=0.3): (
        18, 19, 16, 22, 18, 20, 14, 22, 11, 3, 24, 9, 20, 23, 23, 20, 18, 20, 18, 25, 19, 18, 20, 9, 23, 21, 16, 7, 21,
        19, 23, 23,
    ),
    NegativeFilters(min_distance=1.0): (
        20, 25, 24, 25, 25, 22, 26, 23, 17, 27, 26, 25, 20, 23, 23, 19, 21, 20, 19, 25, 20, 22, 21, 17, 26, 24, 22, 20,
        22, 24, 24, 27,
    ),
}  # fmt: skip
"""Negatives that sentence-transformers 6.2's mine_hard_negatives kept of each anchor (28 candidates, all positives as
pairs, output_format labeled-list); the last one with max_score=0.5. Run once beside this project, the values kept."""


@pytest.mark.parametrize("filters", PEER, ids=str)
def test_filters_keep_as_many_as_sentence_transformers(filters: NegativeFilters) -> None:
    generator = np.random.default_rng(7)
    labels = np.repeat(np.arange(8), 4)
    points = (generator.normal(size=(8, 6))[labels] + 0.8 * generator.normal(size=(32, 6))).astype(np.float32)
    unit = torch.nn.functional.normalize(torch.from_numpy(points), dim=1)
    items = torch.arange(32)
    # The anchor itself is one of the peer's 28 + 3 candidates.
    found = nearest(unit, unit, query_items=items, gallery_items=items, n_items=30)
    allowed, _ = filter_negatives(found, torch.from_numpy(labels), filters, unit)
    assert tuple(allowed.sum(dim=1).tolist()) == PEER[filters]


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
