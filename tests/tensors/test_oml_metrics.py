"""OML's metrics against the values OML 4.0.0 gives and against its definition written out literally."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import metrics, oml_metrics


def one_query(rel: list[bool], n_relevant: int, ks: tuple[int, ...]) -> dict[str, float]:
    row = torch.tensor([rel], dtype=torch.bool).view(1, len(rel))
    found = oml_metrics.per_query(row, torch.tensor([len(rel)]), torch.tensor([n_relevant]), ks)
    return {key: values.item() for key, values in found.items()}


def test_per_query_formulae_give_omls_values() -> None:
    found = one_query([False, True, True, False, True], 5, (1, 2, 3, 5, 10))
    wanted = {
        "cmc": [0, 1, 1, 1, 1],
        "precision": [0, 1 / 2, 2 / 3, 3 / 5, 3 / 5],
        "map": [0, 0.5, 0.58333, 0.58889, 0.58889],
    }
    for name, values in wanted.items():
        assert [found[f"{name}@{k}"] for k in (1, 2, 3, 5, 10)] == pytest.approx(values, abs=1e-5)
    assert one_query([True, True], 3, (5,))["precision@5"] == 1.0
    assert one_query([True, False, False, False, False], 5, (5,))["map@5"] == 1.0


@pytest.mark.parametrize(("rel", "n_relevant", "wanted"), [([], 0, 1.0), ([], 1, 0.0), ([False, False], 0, 0.0)])
def test_per_query_nothing_relevant_or_nothing_retrieved_follows_the_table(
    rel: list[bool], n_relevant: int, wanted: float
) -> None:
    assert set(one_query(rel, n_relevant, (1, 5)).values()) == {wanted}


def test_fnmr_at_fmr_gives_omls_values() -> None:
    positive = torch.tensor([0.0, 0, 1, 1, 2, 2, 5, 5, 9, 9])
    negative = torch.tensor([3.0, 3, 4, 4, 6, 6, 7, 7, 8, 8])
    found = oml_metrics.fnmr_at_fmr(positive, negative, (0.1, 0.5))
    assert found == pytest.approx({"fnmr@fmr=0.1": 0.4, "fnmr@fmr=0.5": 0.2})


@pytest.mark.parametrize("seed", range(5))
def test_fnmr_at_fmr_random_distances_equals_numpy_quantile(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.randint(0, 30, (n,), generator=generator).double() / 7 for n in (53, 211))
    rates = (0.0, 0.01, 0.1, 0.37, 0.5, 0.999, 1.0)
    found = oml_metrics.fnmr_at_fmr(positive, negative, rates)
    for rate in rates:
        threshold = np.quantile(negative.numpy(), rate)
        assert found[f"fnmr@fmr={rate:g}"] == (positive.numpy() >= threshold).mean()


def test_fnmr_at_fmr_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="fmrs="):
        oml_metrics.fnmr_at_fmr(torch.ones(2), torch.ones(2), (1.1,))
    with pytest.raises(BadInput, match="positive and a negative"):
        oml_metrics.fnmr_at_fmr(torch.ones(2), torch.ones(0), (0.1,))


def test_pcf_gives_omls_values_and_stays_within_one() -> None:
    assert oml_metrics.pcf(torch.eye(4, 10), (0.5, 1.0)) == pytest.approx({"pcf@0.5": 0.2, "pcf@1": 0.5})
    many = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert oml_metrics.pcf(many, (1.0,)) == {"pcf@1": 1.0}
    assert oml_metrics.pcf(torch.ones(5, 3), (0.5,)) == {"pcf@0.5": 0.0}


def test_pcf_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="variances="):
        oml_metrics.pcf(torch.eye(3), (-0.1,))
    with pytest.raises(BadInput, match="at least 2"):
        oml_metrics.pcf(torch.ones(1, 3), (0.5,))


ALL = range(200)
RANDOM_CASES = [
    ("all", ALL, ALL, False, [0.04, 0.215, 0.048, 0.09875, 0.903415]),
    ("split", range(60), range(60, 200), False, [0.066667, 0.183333, 0.043333, 0.098611, 0.902655]),
    ("sequence", range(120), range(50, 200), True, [0.05, 0.225, 0.055, 0.104352, 0.888407]),
]


@pytest.mark.parametrize(("queries", "gallery", "has_sequence", "wanted"), [case[1:] for case in RANDOM_CASES])
def test_random_embeddings_end_to_end_give_omls_values(
    queries: range, gallery: range, has_sequence: bool, wanted: list[float]
) -> None:
    state = np.random.RandomState(0)
    x = state.randn(200, 16).astype(np.float32)
    labels = torch.from_numpy(state.randint(0, 20, 200))
    sequences = torch.from_numpy(state.randint(0, 66, 200))
    q, g = torch.tensor(list(queries)), torch.tensor(list(gallery))
    q = q[torch.randperm(len(q), generator=torch.Generator().manual_seed(1))]
    points = torch.from_numpy(x).double()
    distances = (points[q][:, None] - points[g][None]).norm(dim=2)
    is_ignored = q[:, None] == g[None]
    if has_sequence:
        is_ignored |= sequences[q][:, None] == sequences[g][None]
    is_match = labels[q][:, None] == labels[g][None]
    order = distances.masked_fill(is_ignored, torch.inf).sort(dim=1, stable=True)
    retrieved = torch.where(order.values.isfinite(), g[order.indices], -1)
    seq = sequences if has_sequence else None
    n_relevant = metrics.count_relevant(
        q, labels[q], None if seq is None else seq[q], g, labels[g], None if seq is None else seq[g]
    )
    assert torch.equal(n_relevant, (is_match & ~is_ignored).sum(dim=1))
    per_query = oml_metrics.per_query(
        metrics.relevance(retrieved, labels[q], labels), (retrieved >= 0).sum(dim=1), n_relevant, (1, 5)
    )
    found = metrics.means(per_query)
    fnmr = oml_metrics.fnmr_at_fmr(distances[is_match & ~is_ignored], distances[~is_match & ~is_ignored], (0.1,))
    keys = ("cmc@1", "cmc@5", "precision@5", "map@5")
    assert [*(found[key] for key in keys), fnmr["fnmr@fmr=0.1"]] == pytest.approx(wanted, abs=1e-5)
    assert oml_metrics.pcf(torch.from_numpy(x), (0.5, 0.9)) == pytest.approx({"pcf@0.5": 0.4375, "pcf@0.9": 0.875})


def test_categories_give_omls_values() -> None:
    retrieved = [[0, 5, 4], [2, 1, 5], [2, 1, 5]]
    relevant = [[0, 10, 4], [2, 3], [2, 3]]
    rows = torch.tensor([[i in gt for i in row] for row, gt in zip(retrieved, relevant, strict=True)])
    found = oml_metrics.per_query(rows, torch.tensor([3, 3, 3]), torch.tensor([3, 2, 2]), (3,))
    by_category = metrics.means_by_category(found, torch.tensor([0, 1, 1]))
    assert by_category[0]["precision@3"] == pytest.approx(2 / 3)
    assert by_category[1]["precision@3"] == pytest.approx(1 / 2)
    assert metrics.means(found)["precision@3"] == pytest.approx(5 / 9)


def literal(rel: list[bool], n_relevant: int, k: int) -> list[float]:
    short = min(k, len(rel))
    if not rel:
        return [float(n_relevant == 0)] * 3
    hits = sum(rel[:short])
    precision = hits / min(n_relevant, short) if n_relevant else 0.0
    gain = sum(sum(rel[: i + 1]) / (i + 1) for i in range(short) if rel[i])
    return [float(hits > 0), precision, gain / hits if hits else 0.0]


def test_per_query_ragged_random_rows_equal_literal_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 13, (200,), generator=generator)
    rows = torch.rand(200, 12, generator=generator) < 0.3
    rows &= torch.arange(12) < lengths[:, None]
    n_relevant = rows.sum(dim=1) + torch.randint(0, 3, (200,), generator=generator)
    found = oml_metrics.per_query(rows, lengths, n_relevant, (1, 4, 30))
    for q in range(200):
        for k in (1, 4, 30):
            wanted = literal(rows[q, : lengths[q]].tolist(), int(n_relevant[q]), k)
            assert [found[f"{name}@{k}"][q].item() for name in ("cmc", "precision", "map")] == pytest.approx(wanted)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time on one thread, which other processes of the machine do not lengthen much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        work()
        return time.process_time() - started
    finally:
        torch.set_num_threads(threads)


def test_nine_metrics_of_ten_thousand_queries_take_a_fraction_of_omls_second() -> None:
    rows = torch.rand(10_000, 100, generator=torch.Generator().manual_seed(4)) < 0.1
    lengths, n_relevant = torch.full((10_000,), 100), rows.sum(dim=1) + 1
    seconds = [cpu_seconds(lambda: oml_metrics.per_query(rows, lengths, n_relevant, (1, 5, 10))) for _ in range(3)]
    assert min(seconds) < 0.1
