"""The model of growth: bounds that can be worked out by hand, and real Ray workers whose blocks sleep."""

import math

import pytest

from benchmarks.simulate import Cluster, Stage, block_seconds, check, linear_up_to, simulate

SLEEP = Stage("sleep", 1, device_s=0.2, driver_s=0.0)


@pytest.mark.parametrize(("n_workers", "n_blocks"), [(1, 7), (3, 8), (4, 64), (50, 20)])
def test_without_a_driver_it_takes_the_rounds_of_the_workers(n_workers: int, n_blocks: int) -> None:
    cluster = Cluster(n_workers, start_s=0.0, call_s=0.0)
    assert simulate(SLEEP, cluster, n_blocks).seconds == pytest.approx(0.2 * math.ceil(n_blocks / n_workers))


def test_with_many_workers_the_driver_decides() -> None:
    stage = Stage("fast", 1, device_s=0.01, driver_s=0.01)
    found = simulate(stage, Cluster(100, start_s=0.0), 10_000)
    assert found.bottleneck == "driver"
    assert found.seconds == pytest.approx(10_000 * 0.01, rel=0.02)
    assert linear_up_to(stage, Cluster(1), 10_000) <= 2


def test_long_runs_are_carried_on_at_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, cluster = Stage("x", 10, device_s=0.01, driver_s=0.001), Cluster(7)
    whole = simulate(stage, cluster, 300_000).seconds
    monkeypatch.setattr("benchmarks.simulate.MOST_EVENTS", 3_000)
    assert simulate(stage, cluster, 300_000).seconds == pytest.approx(whole, rel=0.005)


@pytest.mark.parametrize(
    ("changes", "slowest", "seconds"),
    [
        ({}, "device", 100 * 0.01),
        ({"cpu_s": 0.16}, "CPUs", 100 * 0.02),
        ({"bytes_in": 1e8}, "network", 100 * 0.08),
    ],
)
def test_slowest_resource_of_a_worker_decides(changes: dict[str, float], slowest: str, seconds: float) -> None:
    found, name = block_seconds(
        Stage("x", 100, device_s=0.01, **changes),  # pyright: ignore[reportArgumentType]
        Cluster(1, call_s=0.0, latency_s=0.0),
        100,
    )
    assert name == slowest
    assert found == pytest.approx(seconds)


@pytest.mark.ray
@pytest.mark.slow
def test_real_workers_take_what_the_model_says() -> None:
    for n_workers, took, predicted in check(workers=(1, 4), n_blocks=24, seconds=0.5):
        assert predicted == pytest.approx(took, rel=0.15), n_workers
