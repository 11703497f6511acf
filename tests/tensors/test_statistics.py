"""Resampling statistics against scipy, ranx, exact enumeration and planted truth."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ranx.statistical_tests import fisher_randomization_test
from scipy import stats

from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import metrics, statistics


def column(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))[:, None]


def clustered_differences(seed: int, n_labels: int = 40, per_label: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """No true difference, and queries of a label that move together."""
    state = np.random.RandomState(seed)
    labels = np.repeat(np.arange(n_labels), per_label)
    values = 0.1 * state.randn(n_labels)[labels] + 0.05 * state.randn(len(labels))
    return column(values), torch.from_numpy(labels)


def test_bootstrap_single_queries_agrees_with_scipy_percentile_interval() -> None:
    values = np.random.RandomState(0).exponential(size=400)
    found = statistics.bootstrap(column(values), None, seed=1, n_resamples=20_000)[0]
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.mean == pytest.approx(values.mean(), abs=1e-15)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_bootstrap_clusters_agrees_with_scipy_on_the_ratio_of_sums() -> None:
    state = np.random.RandomState(3)
    sizes = state.randint(1, 30, 50)
    labels = np.repeat(np.arange(50) * 7 - 3, sizes)
    values = state.randn(50).repeat(sizes) + 0.3 * state.randn(len(labels))
    shuffled = state.permutation(len(labels))
    found = statistics.bootstrap(
        column(values[shuffled]), torch.from_numpy(labels[shuffled]), seed=4, n_resamples=20_000
    )[0]
    sums = np.array([values[labels == label].sum() for label in np.unique(labels)])
    theirs = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_bootstrap_queries_of_a_label_agree_interval_is_wider_than_naive() -> None:
    values, labels = clustered_differences(seed=6)
    clustered = statistics.bootstrap(values, labels, seed=0)[0]
    naive = statistics.bootstrap(values, None, seed=0)[0]
    assert clustered.mean == naive.mean
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_bootstrap_same_seed_same_bits_for_any_order_of_queries_and_threads() -> None:
    values, labels = clustered_differences(seed=7)
    wanted = statistics.bootstrap(values, labels, seed=9)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    assert statistics.bootstrap(values[order], labels[order], seed=9) == wanted
    assert statistics.bootstrap(values, labels, seed=10) != wanted
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert statistics.bootstrap(values, labels, seed=9) == wanted
    finally:
        torch.set_num_threads(threads)


def test_draws_are_those_of_one_table_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_drawn in (7, 20):
        generator = torch.Generator().manual_seed(3)
        cells = torch.randint(7, (10, n_drawn), generator=generator)
        wanted = torch.stack([torch.bincount(row, minlength=7) for row in cells]).double()
        for elements in (7, 30, 1000):
            monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", elements)
            found = [draws.clone() for draws in statistics.multinomial_draws(7, 10, 3, n_drawn)]
            assert torch.equal(torch.cat(found), wanted)


RESAMPLED = """
import torch
from pathlib import Path
from distributed_rerank.tensors import statistics

def memory_mb(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1000

values = torch.rand(250_000, 2, dtype=torch.float64)
Path("/proc/self/clear_refs").write_text("5")
before = memory_mb("VmRSS")
statistics.compare({"m": values[:, 0]}, {"m": values[:, 1]}, torch.arange(250_000), seed=0, n_resamples=160)
print(memory_mb("VmHWM") - before)
"""


def test_resampling_many_clusters_takes_the_memory_of_one_block() -> None:
    """Two blocks of 32 MiB beside the columns. Blocks made anew took 190 MB here, and 4 GB of 2,000 resamples in a
    process whose memory is in pieces."""
    done = subprocess.run([sys.executable, "-c", RESAMPLED], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 140


def test_bootstrap_bad_input_is_refused() -> None:
    one = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(BadInput, match="no query"):
        statistics.bootstrap(one[:0], None, seed=0)
    with pytest.raises(BadInput, match="n_resamples=0"):
        statistics.bootstrap(one, None, seed=0, n_resamples=0)
    with pytest.raises(BadInput, match="level=1"):
        statistics.bootstrap(one, None, seed=0, level=1.0)


@pytest.mark.parametrize("seed", range(3))
def test_sign_flip_few_clusters_agrees_with_exact_enumeration_and_its_ties(seed: int) -> None:
    state = np.random.RandomState(seed)
    labels = np.repeat(np.arange(9), 4)
    values = state.randint(-1, 2, 36) * 0.1 + 0.05
    sums = np.array([values[labels == label].sum() for label in range(9)]).round(9)
    flipped = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=9)]
    exact = np.mean(np.array(flipped) >= abs(sums.sum()) - 1e-9)
    found = statistics.sign_flip_p_values(column(values), torch.from_numpy(labels), seed=0, n_resamples=20_000)
    assert found[0] == pytest.approx(exact, abs=0.015)


def test_sign_flip_single_queries_agrees_with_scipy_and_ranx() -> None:
    state = np.random.RandomState(4)
    before = state.rand(80)
    after = before + 0.1 * state.randn(80) + 0.02
    found = statistics.sign_flip_p_values(column(after - before), None, seed=0, n_resamples=20_000)[0]
    theirs = stats.permutation_test(
        (after - before,),
        np.mean,
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue
    ranx_p = fisher_randomization_test(before, after, n_permutations=20_000, random_seed=1)[0]
    assert found == pytest.approx(theirs, abs=0.015)
    assert found == pytest.approx(float(ranx_p), abs=0.015)


def test_sign_flip_no_difference_has_p_value_one() -> None:
    zeros = torch.zeros(10, 2, dtype=torch.float64)
    assert statistics.sign_flip_p_values(zeros, torch.arange(10) // 2, seed=0) == [1.0, 1.0]


def test_null_runs_raise_a_false_alarm_five_percent_of_the_time() -> None:
    n_alarms = 0
    for run in range(200):
        values, labels = clustered_differences(seed=1000 + run, per_label=5)
        n_alarms += statistics.sign_flip_p_values(values, labels, seed=run, n_resamples=500)[0] < 0.05
    assert 0.02 <= n_alarms / 200 <= 0.08


def planted_improvement() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """400 labels of 10 queries, of which exactly 12 (3 %) improve."""
    state = np.random.RandomState(5)
    labels = np.repeat(np.arange(400), 10)
    before = 0.6 * state.rand(4000)
    after = np.where(labels % 400 < 12, before + 0.3, before)
    return torch.from_numpy(before), torch.from_numpy(after), torch.from_numpy(labels)


def test_compare_three_percent_of_labels_improved_is_found_significant() -> None:
    before, after, labels = planted_improvement()
    found = statistics.compare({"map@10": before}, {"map@10": after}, labels, seed=0)["map@10"]
    assert found.low > 0
    assert found.p_value < 0.01
    assert found.mean == pytest.approx((after - before).mean().item(), abs=1e-15)
    assert (found.n_better, found.n_worse, found.n_equal) == (120, 0, 3880)
    assert found.n_clusters == 400


def test_compare_permuted_improvement_is_not_significant() -> None:
    before, after, labels = planted_improvement()
    swapped = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.5
    first = torch.where(swapped[labels], after, before)
    second = torch.where(swapped[labels], before, after)
    found = statistics.compare({"m": first}, {"m": second}, labels, seed=0)["m"]
    assert found.low <= 0 <= found.high
    assert found.p_value > 0.05
    assert found.n_better + found.n_worse == 120


def test_compare_shared_metrics_equal_those_compared_alone() -> None:
    before, after, labels = planted_improvement()
    both = statistics.compare({"a": before, "b": after, "only": before}, {"a": after, "b": before}, labels, seed=3)
    assert list(both) == ["a", "b"]
    assert both["a"] == statistics.compare({"a": before}, {"a": after}, labels, seed=3)["a"]
    assert (both["b"].mean, both["b"].low) == (-both["a"].mean, pytest.approx(-both["a"].high, abs=1e-12))
    with pytest.raises(BadInput, match="no metric in common"):
        statistics.compare({"a": before}, {"b": after}, labels, seed=0)


def test_compare_to_json_holds_every_field_and_the_interval_as_a_pair() -> None:
    before, after, labels = planted_improvement()
    found = statistics.compare({"m": before}, {"m": after}, labels, seed=1, n_resamples=50)["m"]
    written = statistics.compare_to_json({"m": before}, {"m": after}, labels, seed=1, n_resamples=50)["m"]
    assert written.pop("ci95") == [found.low, found.high]
    assert all(getattr(found, name) == value for name, value in written.items())
    assert len(written) == 6


def test_compare_by_category_equals_compare_of_each_mask() -> None:
    before, after, labels = planted_improvement()
    categories = labels % 3
    found = statistics.compare_by_category({"m": before}, {"m": after}, labels, categories, seed=2)
    assert list(found) == [0, 1, 2]
    rows = categories == 1
    wanted = statistics.compare({"m": before[rows]}, {"m": after[rows]}, labels[rows], seed=2)
    assert found[1] == wanted


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


def test_compare_ten_thousand_queries_two_thousand_resamples_take_seconds() -> None:
    state = torch.Generator().manual_seed(0)
    before, after = ({f"m{i}": torch.rand(10_000, generator=state).double() for i in range(10)} for _ in range(2))
    labels = torch.arange(10_000) // 5
    assert cpu_seconds(lambda: statistics.compare(before, after, labels, seed=0, n_resamples=2000)) < 5


def test_oracle_is_the_best_of_all_orders_of_the_head() -> None:
    row = [False, True, False, True, False, True]
    n_relevant = torch.tensor([4])

    def value(rel: list[bool]) -> float:
        return metrics.per_query(torch.tensor([rel]), n_relevant, (1,))["map@10"].item()

    best = max(value([*head, *row[4:]]) for head in itertools.permutations(row[:4]))
    found = statistics.oracle(torch.tensor([row]), 4)
    assert found.tolist() == [[True, True, False, False, False, True]]
    assert value(found[0].tolist()) == best


@pytest.mark.parametrize("top_n", [1, 3, 10, 50])
def test_oracle_keeps_hits_of_head_and_tail_in_place(top_n: int) -> None:
    rows = torch.rand(30, 10, generator=torch.Generator().manual_seed(2)) < 0.3
    found = statistics.oracle(rows, top_n)
    assert torch.equal(found[:, top_n:], rows[:, top_n:])
    assert torch.equal(found[:, :top_n].sum(dim=1), rows[:, :top_n].sum(dim=1))
    assert torch.equal(found[:, 0], rows[:, :top_n].any(dim=1))


def test_headroom_captured_is_the_share_and_none_without_room() -> None:
    assert statistics.headroom_captured(0.5, 0.6, 0.9) == pytest.approx(0.25)
    assert statistics.headroom_captured(0.5, 0.4, 0.9) == pytest.approx(-0.25)
    assert statistics.headroom_captured(0.9, 0.9, 0.9) is None


def test_knee_is_the_first_setting_not_told_from_the_best() -> None:
    state = np.random.RandomState(8)
    labels = torch.from_numpy(np.repeat(np.arange(50), 8))
    base = state.rand(50)[labels.numpy()]
    gains = (0.0, 0.05, 0.1, 0.1005, 0.1006)
    curve = torch.from_numpy(np.stack([base + gain + 0.02 * state.randn(400) for gain in gains]))
    assert statistics.knee(curve, labels, seed=0) == 2
    falling = curve.flip(0)[2:].contiguous()
    assert statistics.knee(falling, labels, seed=0) == 0


def test_student_t_is_that_of_scipy() -> None:
    for freedom in (1.0, 2.0, 3.5, 9.0, 200.0):
        for t in (-40.0, -2.0, 0.0, 0.3, 1.96, 12.0):
            assert statistics.student_t_cdf(t, freedom) == pytest.approx(float(stats.t.cdf(t, freedom)), abs=1e-8)


def test_probability_of_gain_is_the_one_sided_test_of_cluster_means_without_a_prior() -> None:
    state = np.random.default_rng(0)
    means = state.normal(0.02, 0.05, 12)
    change, clusters = torch.from_numpy(np.repeat(means, 4)), torch.arange(12).repeat_interleave(4)
    found = statistics.probability_of_gain(change, clusters, prior_spread=0.1, prior_clusters=0)
    expected = 1 - float(stats.ttest_1samp(means, 0, alternative="greater").pvalue)
    assert found == pytest.approx(expected, abs=1e-8)
    with_prior = statistics.probability_of_gain(change, clusters, prior_spread=0.5, prior_clusters=2)
    assert 0.5 < with_prior < found
    one = statistics.probability_of_gain(change, torch.zeros(48, dtype=torch.int64), prior_spread=0.1, prior_clusters=2)
    assert one == 0
    none = statistics.probability_of_gain(0 * change, clusters, prior_spread=0.1, prior_clusters=2)
    assert none == pytest.approx(0.5)


def test_labels_that_are_alike_by_chance_are_no_surer_than_their_queries() -> None:
    """Hits and misses at random: a step must not be taken more often than its probability says, nor without a cause."""
    state, shown = np.random.default_rng(0), []
    clusters = torch.arange(4).repeat_interleave(10)
    for _ in range(800):
        change = torch.from_numpy(state.choice([-1.0, 0.0, 1.0], 40, p=[0.12, 0.76, 0.12]))
        shown.append(statistics.probability_of_gain(change, clusters, prior_spread=0.05, prior_clusters=2) >= 0.995)
    assert np.mean(shown) <= 0.005
    # Four labels of the same mean: by labels alone the mean would be certain but for the prior.
    change = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 4, dtype=torch.float64)
    found = statistics.probability_of_gain(change, clusters, prior_spread=0.01, prior_clusters=2)
    spread = float(change.numpy().std(ddof=1)) / np.sqrt(40)
    assert found == pytest.approx(float(stats.t.cdf(0.1 / spread, 5)), abs=1e-8)


def test_queries_needed_make_every_second_sample_show_the_gain() -> None:
    state = np.random.default_rng(0)

    def sample(n_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
        gain = 0.02 + 0.08 * state.normal(size=n_labels)
        values = np.repeat(gain, 5) + 0.1 * state.normal(size=5 * n_labels)
        return torch.from_numpy(values), torch.arange(n_labels).repeat_interleave(5)

    # Averaged over many samples the number needed is that of the true mean and spread: (1.96 s / 0.02) ** 2 labels.
    true_labels = 1.96**2 * (0.08**2 + 0.1**2 / 5) / 0.02**2
    values, clusters = sample(20)
    values = values - values.mean() + 0.02
    needed = statistics.queries_needed(values, clusters)
    assert needed is not None
    assert 5 * 20 + needed == pytest.approx(5 * true_labels, rel=0.5)
    shown = []
    for _ in range(60):
        more, labels = sample(round(true_labels))
        shown.append(statistics.queries_needed(more, labels) == 0)
        (interval,) = statistics.bootstrap(more[:, None], labels, seed=0, n_resamples=500)
        assert shown[-1] == (interval.low > 0) or abs(interval.low) < 0.004
    assert 0.3 < np.mean(shown) < 0.7
    assert statistics.queries_needed(torch.zeros(4).double(), torch.arange(4)) is None
    assert statistics.queries_needed(torch.ones(4).double(), torch.zeros(4, dtype=torch.int64)) is None
