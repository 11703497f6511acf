"""Textbook metrics against a literal definition, ranx, ir_measures and scikit-learn."""

import math

import ir_measures
import numpy as np
import pytest
import ranx
import torch
from sklearn.metrics import average_precision_score

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import metrics

KS = (1, 3, 5, 20)


def literal(rel: list[bool], n_relevant: int, k: int) -> dict[str, float]:
    precision = [sum(rel[: i + 1]) / (i + 1) for i in range(len(rel))]
    gain = [p * r for p, r in zip(precision, rel, strict=True)]
    return {
        f"cmc@{k}": float(any(rel[:k])),
        f"precision@{k}": sum(rel[:k]) / k,
        f"recall@{k}": sum(rel[:k]) / n_relevant,
        f"map@{k}": sum(gain[:k]) / min(k, n_relevant),
        "map@r": sum(gain[:n_relevant]) / n_relevant,
        "precision@r": sum(rel[:n_relevant]) / n_relevant,
        "mrr": next((1 / (i + 1) for i, r in enumerate(rel) if r), 0.0),
    }


def random_lists(n_queries: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    is_relevant = torch.rand(n_queries, k, generator=generator) < 0.25
    missed = torch.randint(1, 9, (n_queries,), generator=generator)
    return is_relevant, is_relevant.sum(dim=1) + missed


@pytest.mark.parametrize("k", [1, 4, 12, 40])
def test_per_query_random_lists_equals_literal_definition(k: int) -> None:
    is_relevant, n_relevant = random_lists(60, k, seed=k)
    found = metrics.per_query(is_relevant, n_relevant, KS)
    for query in range(60):
        for cut in (*KS, 10):
            wanted = literal(is_relevant[query].tolist(), int(n_relevant[query]), cut)
            for key in set(wanted) & set(found):
                assert found[key][query].item() == pytest.approx(wanted[key], abs=1e-12), key
    assert {"cmc@3", "precision@20", "recall@1", "map@10", "map@r", "precision@r", "mrr"} <= set(found)
    assert "cmc@10" not in found


def test_per_query_example_has_the_values_worked_by_hand() -> None:
    found = metrics.per_query(torch.tensor([[True, False, False, True]]), torch.tensor([5]), (1, 5))
    assert found["map@5"].item() == pytest.approx((1 + 2 / 4) / 5)
    assert found["map@r"].item() == pytest.approx((1 + 2 / 4) / 5)
    assert found["precision@5"].item() == pytest.approx(0.4)
    assert found["map@1"].item() == 1.0


def as_run(is_relevant: torch.Tensor, n_relevant: torch.Tensor) -> tuple[dict, dict]:
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for q, row in enumerate(is_relevant.tolist()):
        run[f"q{q}"] = {f"d{i}": float(len(row) - i) for i in range(len(row))}
        unseen = {f"x{j}": 1 for j in range(int(n_relevant[q]) - sum(row))}
        qrels[f"q{q}"] = {f"d{i}": 1 for i, r in enumerate(row) if r} | unseen
    return qrels, run


def test_per_query_agrees_with_ranx_where_definitions_coincide() -> None:
    is_relevant, n_relevant = random_lists(40, 30, seed=5)
    ours = metrics.means(metrics.per_query(is_relevant, n_relevant, (1, 5)))
    qrels, run = as_run(is_relevant, n_relevant)
    pairs = {"hit_rate@5": "cmc@5", "precision@5": "precision@5", "recall@5": "recall@5", "mrr": "mrr"}
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), [*pairs, "hit_rate@1"])
    for their_key, our_key in pairs.items():
        assert ours[our_key] == pytest.approx(theirs[their_key], abs=1e-12)


def test_per_query_agrees_with_ir_measures_where_definitions_coincide() -> None:
    is_relevant, n_relevant = random_lists(40, 30, seed=6)
    ours = metrics.means(metrics.per_query(is_relevant, n_relevant.clamp(max=30), (1, 5, 30)))
    qrels, run = as_run(is_relevant, n_relevant.clamp(max=30))
    wanted = {
        ir_measures.P @ 5: "precision@5",
        ir_measures.R @ 5: "recall@5",
        ir_measures.Success @ 5: "cmc@5",
        ir_measures.RR: "mrr",
        ir_measures.AP @ 30: "map@30",
    }
    theirs = ir_measures.calc_aggregate(list(wanted), qrels, run)
    for measure, key in wanted.items():
        assert ours[key] == pytest.approx(theirs[measure], abs=1e-9), key


def test_map_over_the_whole_gallery_is_sklearn_average_precision() -> None:
    is_relevant = random_lists(30, 50, seed=7)[0]
    is_relevant[:, 49] = True
    found = metrics.per_query(is_relevant, is_relevant.sum(dim=1), (50,))["map@50"]
    for row, value in zip(is_relevant.numpy(), found.tolist(), strict=True):
        assert value == pytest.approx(average_precision_score(row, -np.arange(50)), abs=1e-12)


def test_per_query_ragged_row_equals_its_short_row() -> None:
    short, n_relevant = random_lists(20, 4, seed=8)
    padded = torch.cat([short, torch.zeros(20, 7, dtype=torch.bool)], dim=1)
    one, other = (metrics.per_query(rows, n_relevant, KS) for rows in (short, padded))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_per_query_empty_lists_give_zero_everywhere() -> None:
    found = metrics.per_query(torch.zeros(2, 0, dtype=torch.bool), torch.tensor([1, 3]), (1, 5))
    assert all(torch.equal(values, torch.zeros(2, dtype=torch.float64)) for values in found.values())


def test_per_query_any_blocks_of_queries_give_the_same_bits() -> None:
    is_relevant, n_relevant = random_lists(101, 33, seed=9)
    whole = metrics.per_query(is_relevant, n_relevant, KS)
    for size in (1, 7, 64):
        cut = [
            metrics.per_query(rows, counts, KS)
            for rows, counts in zip(is_relevant.split(size), n_relevant.split(size), strict=True)
        ]
        assert all(torch.equal(whole[key], torch.cat([block[key] for block in cut])) for key in whole)


@pytest.mark.parametrize("ks", [(), (0,), (5, -1)])
def test_per_query_cutoff_below_one_is_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="ks="):
        metrics.per_query(torch.ones(1, 2, dtype=torch.bool), torch.tensor([2]), ks)


def test_per_query_without_relevant_items_is_refused() -> None:
    with pytest.raises(BadInput, match="1 queries have no relevant"):
        metrics.per_query(torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0, 1]), (1,))


def test_relevance_missing_candidates_and_missing_labels_are_not_relevant() -> None:
    item_labels = torch.tensor([4, 4, -1, 5])
    candidates = torch.tensor([[0, 1, 2, 3, -1], [2, 3, 0, 1, -1]])
    found = metrics.relevance(candidates, torch.tensor([4, -1]), item_labels)
    assert found.tolist() == [[True, True, False, False, False], [False] * 5]


@pytest.mark.parametrize("seed", range(20))
def test_count_relevant_random_catalogue_equals_literal_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 5, (40,), generator=generator)
    sequences = torch.randint(-1, 12, (40,), generator=generator)
    queries = torch.randperm(40, generator=generator)[: 25 if seed else 0]
    gallery = torch.randperm(40, generator=generator)[: 30 if seed != 1 else 0]
    for seq in (sequences, None):
        found = metrics.count_relevant(
            queries,
            labels[queries],
            None if seq is None else seq[queries],
            gallery,
            labels[gallery],
            None if seq is None else seq[gallery],
        )
        wanted = [
            sum(
                bool(labels[g] == labels[q] and labels[q] >= 0 and g != q)
                and not (seq is not None and seq[q] >= 0 and bool(seq[g] == seq[q]))
                for g in gallery.tolist()
            )
            for q in queries.tolist()
        ]
        assert found.tolist() == wanted


def test_count_relevant_hundred_thousand_items_needs_no_square_matrix() -> None:
    n = 100_000
    items, labels, sequences = torch.arange(n), torch.arange(n) % 5000, torch.arange(n) // 7
    found = metrics.count_relevant(items, labels, sequences, items, labels, sequences)
    assert torch.equal(found, torch.full((n,), 19))


def test_first_hit_is_the_place_from_one_and_zero_without_hit() -> None:
    rows = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    assert metrics.first_hit(rows).tolist() == [2, 0, 1]
    assert metrics.first_hit(rows[:, :0]).tolist() == [0, 0, 0]


def test_means_are_the_same_bits_for_any_order_of_queries() -> None:
    values = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = metrics.means({"m": values})["m"]
    for seed in range(5):
        order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
        assert metrics.means({"m": values[order]})["m"] == wanted
    assert wanted == math.fsum(values.tolist()) / 5000


def test_means_without_queries_is_refused() -> None:
    with pytest.raises(BadInput, match="no query has a relevant"):
        metrics.means({"cmc@1": torch.zeros(0, dtype=torch.float64)})


def test_means_by_category_equals_the_mean_of_each_mask() -> None:
    is_relevant, n_relevant = random_lists(50, 10, seed=11)
    categories = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1)) * 3
    values = metrics.per_query(is_relevant, n_relevant, (1, 5))
    found = metrics.means_by_category(values, categories)
    assert list(found) == sorted(set(categories.tolist()))
    for category, row in found.items():
        for key, mean in row.items():
            assert mean == pytest.approx(values[key][categories == category].mean().item(), abs=1e-12)
