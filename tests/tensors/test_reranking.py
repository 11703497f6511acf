"""Merging and fusion against OML's cases (oml-semantics 6.4, 6.6), a per-row loop, and their invariants."""

import pytest
import torch
from torch import Tensor

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.reranking import fuse, merge_replace

EPS = 1000 * torch.finfo(torch.float32).eps
INF = torch.inf


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


@pytest.mark.parametrize(
    ("distances", "logits", "order", "expected"),
    [
        ([0.1, 0.2, 0.5, 0.6, 0.7], [0.4, 0.2, 0.3], [1, 2, 0, 3, 4], [0.2, 0.3, 0.4, 0.6, 0.7]),
        (
            [0.1, 0.2, 0.3, 0.5, 0.6],
            [1, 2, 5],
            [0, 1, 2, 3, 4],
            [0.1 - EPS, 0.2 - EPS, 0.5 - EPS, 0.5, 0.6],
        ),
        ([0.1, 0.2, 0.5], [0.5, 0.4], [1, 0, 2], [0.4, 0.5, 0.5]),
        ([0.1, 0.2, 0.3], [3, 1, 2], [1, 2, 0], [1, 2, 3]),
        (
            [0.1, 0.2, 0.3, 0.4, 0.5],
            [0.9, 0.3, 0.9, 0.3],
            [1, 3, 0, 2, 4],
            [0.3 * 0.5 / 0.9 - EPS, 0.3 * 0.5 / 0.9 - EPS, 0.5 - EPS, 0.5 - EPS, 0.5],
        ),
    ],
)
def test_merge_replace_conformance_cases_give_oml_values(
    distances: list[float], logits: list[float], order: list[int], expected: list[float]
) -> None:
    new_order, new_distances = merge_replace(row(*distances), row(*logits))
    assert new_order.tolist() == [order]
    torch.testing.assert_close(new_distances, row(*expected), atol=1e-7, rtol=0)


def test_merge_replace_ragged_rows_shorter_than_top_n_are_reordered_whole_with_raw_values() -> None:
    distances = torch.tensor([[0.1, 0.2, 0.3], [0.1, INF, INF], [INF, INF, INF]])
    logits = torch.tensor([[9.0, 7.0, 8.0], [5.0, torch.nan, INF], [torch.nan] * 3])
    order, new = merge_replace(distances, logits)
    assert order.tolist() == [[1, 2, 0], [0, 1, 2], [0, 1, 2]]
    assert new.tolist() == [[7.0, 8.0, 9.0], [5.0, INF, INF], [INF, INF, INF]]


def test_merge_replace_row_ending_exactly_at_top_n_has_no_tail_to_scale_to() -> None:
    order, new = merge_replace(row(0.1, 0.2, INF), row(4.0, 3.0))
    assert order.tolist() == [[1, 0, 2]]
    assert new.tolist() == [[3.0, 4.0, INF]]


def literal_merge(distances: list[float], logits: list[float]) -> tuple[list[int], list[float]]:
    head = sorted(range(len(logits)), key=lambda place: logits[place])
    values = [logits[place] for place in head]
    tail = distances[len(logits) :]
    if tail and values[-1] > tail[0]:
        values = [value * (tail[0] / values[-1]) - EPS for value in values]
    return head + list(range(len(logits), len(distances))), values + tail


def test_merge_replace_random_rows_match_a_loop_and_keep_the_invariants() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(200, 9, generator=generator).sort(dim=1).values + 0.01
    logits = torch.randint(0, 5, (200, 4), generator=generator) / 4
    before = distances.clone(), logits.clone()
    order, new = merge_replace(distances, logits)
    for query in range(200):
        expected_order, expected = literal_merge(distances[query].tolist(), logits[query].tolist())
        assert order[query].tolist() == expected_order
        torch.testing.assert_close(new[query], torch.tensor(expected), atol=1e-6, rtol=0)
    assert (order[:, :4].sort(dim=1).values == torch.arange(4)).all()
    assert (order[:, 4:] == torch.arange(4, 9)).all()
    assert torch.equal(new[:, 4:], distances[:, 4:])
    assert (new.diff(dim=1) >= 0).all()
    assert torch.equal(distances, before[0])
    assert torch.equal(logits, before[1])


@pytest.mark.parametrize("tail", [-3.0, -0.5, 0.0])
@pytest.mark.parametrize("logits", [(4.0, -1.0, 2.0), (-0.1, -0.4, -0.2), (0.0, -2.0, -1.0)])
def test_merge_replace_tail_not_positive_still_follows_the_head(tail: float, logits: tuple[float, ...]) -> None:
    order, new = merge_replace(row(-9.0, -8.0, -7.0, tail, tail + 1), row(*logits))
    assert order.tolist() == [[1, 2, 0, 3, 4]]
    assert (new.diff(dim=1) >= 0).all()
    assert (new[:, :3].diff(dim=1) > 0).all()
    assert new[0, 3:].tolist() == [tail, tail + 1]


def test_merge_replace_half_precision_logits_are_ranked_and_scaled_in_float32() -> None:
    _, new = merge_replace(row(0.0, 0.1, 0.2, 0.5), torch.tensor([[0.1, 0.7, 0.9]], dtype=torch.float16))
    assert new.dtype == torch.float32
    assert new[0, 0] > 0


def test_merge_replace_large_tail_distances_stay_ascending() -> None:
    _, new = merge_replace(row(1.0, 2.0, 12345.678, 12345.679), row(3e7, 7e7))
    assert (new.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
def test_merge_and_fuse_logit_not_finite_names_the_query(bad: float) -> None:
    distances = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    logits = torch.tensor([[1.0, 2.0], [1.0, bad]])
    with pytest.raises(BadInput, match="query row 1"):
        merge_replace(distances, logits)
    with pytest.raises(ValueError, match="query row 1"):
        fuse(distances, logits, 1.0, 1.0, 2)


def test_merge_replace_top_n_of_one_is_bad_input() -> None:
    with pytest.raises(BadInput, match="top_n=1"):
        merge_replace(row(0.1, 0.2), row(0.5))


def test_merge_and_fuse_no_candidates_at_all_give_a_copy() -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        distances = torch.full(shape, INF)
        logits = torch.zeros(shape)
        for order, new in (merge_replace(distances, logits), fuse(distances, logits, 1.0, 1.0, 5)):
            assert order.shape == new.shape == distances.shape
            assert new is not distances


@pytest.mark.parametrize("pinned", [0, 1, 3])
def test_fuse_matches_a_loop_with_stable_ties_and_ascending_rows(pinned: int) -> None:
    generator = torch.Generator().manual_seed(1)
    distances = (torch.randint(0, 30, (100, 8), generator=generator) / 8).sort(dim=1).values
    distances[::7, 5:] = INF
    distances[::9, 2:] = INF
    logits = torch.randint(-4, 5, (100, 6), generator=generator) / 2
    order, new = fuse(distances, logits, weight=0.5, temperature=2.0, top_n=4, pinned=pinned)
    for query in range(100):
        length = int(distances[query].isfinite().sum())
        fused = [float(0.5 * distances[query, i] + logits[query, i] / 2) for i in range(min(4, length))]
        fused = [min(fused) if place < pinned else value for place, value in enumerate(fused)]
        head = sorted(range(len(fused)), key=lambda place: fused[place])
        assert head[:pinned] == list(range(min(pinned, length)))
        assert order[query].tolist() == head + list(range(len(fused), 8))
        assert new[query, : len(fused)].tolist() == sorted(fused)
        assert (new[query, :length].diff() >= 0).all()
        assert (new[query, length:] == INF).all()
        if length > 4:
            gaps = 0.5 * distances[query, 3:length].diff()
            torch.testing.assert_close(new[query, 3:length].diff(), gaps, atol=1e-6, rtol=0)


def test_fuse_equal_logits_leave_the_first_stage_order() -> None:
    distances = torch.rand(20, 6, generator=torch.Generator().manual_seed(2)).sort(dim=1).values
    order, new = fuse(distances, torch.zeros(20, 6), weight=1.0, temperature=1.0, top_n=6)
    assert (order == torch.arange(6)).all()
    assert torch.equal(new, distances)


@pytest.mark.parametrize(
    ("weight", "temperature", "top_n", "named"),
    [
        (-1.0, 1.0, 2, "weight=-1.0"),
        (1.0, 0.0, 2, "temperature=0.0"),
        (1.0, 1.0, 3, "top_n=3"),
        (1.0, 1.0, 0, "top_n=0"),
    ],
)
def test_fuse_impossible_settings_are_bad_input(weight: float, temperature: float, top_n: int, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        fuse(row(0.1, 0.2, 0.3), row(1.0, 2.0), weight, temperature, top_n)
