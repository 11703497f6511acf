"""How a run grows: a discrete-event model of one driver and many workers, from 10^5 to 10^9 images on 1 to 1,000 GPUs.

    python benchmarks/simulate.py            # the table: hours, price, bottleneck, efficiency, memory of the driver
    python benchmarks/simulate.py --check    # the model against this machine: sleeping blocks on real Ray workers

Events are blocks that a worker finishes. The driver hands out blocks and takes results one after the other, as
cluster/fan_out.py does, with two blocks waiting at each worker. A block takes a worker what its slowest resource takes:
its device, its CPUs, the requests under way to the bucket, or its node's network. All costs are fields below; beside
each stands where it was measured.
"""

import argparse
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

READERS = 64
"""data/decoding.MOST_READERS"""
PROCESS_BYTES = 1.4e9
"""Of a driver with torch and Ray, whatever the number of images: jobs/plan.BYTES_OF_PROCESS."""
MOST_EVENTS = 200_000
"""Longer runs are simulated so far, and the rest at the rate of the second half."""


@dataclass(frozen=True)
class Stage:
    """What one kind of block costs."""

    name: str
    per_block: int
    """Units (images, queries, pairs) in a block."""
    device_s: float
    """Seconds of a worker's device for a unit."""
    cpu_s: float = 0.0
    """Seconds of one CPU for a unit; a worker has `Cluster.cpus_per_worker`."""
    bytes_in: float = 0.0
    """Bytes from the bucket for a unit, by one request."""
    driver_s: float = 0.005
    """Seconds of the driver for a block: hand out, take, check, write. Measured by --check on 2 cores."""
    driver_bytes: float = 0.0
    """Memory of the driver for a unit at its peak; jobs/plan.py has the same figures."""


@dataclass(frozen=True)
class Cluster:
    """The machines."""

    n_workers: int
    cpus_per_worker: int = 8
    call_s: float = 0.002
    """Ray's own time for a call, at the worker (measured: 2.0 ms)."""
    start_s: float = 10.0
    """From the start of the job to the first block, on nodes that run."""
    latency_s: float = 0.03
    """Of a request to the bucket."""
    bytes_per_s: float = 1.25e9
    """Of a node's network, one worker a node."""
    price_per_hour: float = 1.0
    """Of a worker, in any currency."""


@dataclass(frozen=True)
class Outcome:
    """What the model predicts."""

    seconds: float
    driver_share: float
    """Of the time in which the driver is busy."""
    bottleneck: str
    efficiency: float
    """Share of the workers' time that computes."""
    driver_bytes: float


# Device times: 14,374 images/s and 3.4 million pairs/s on an H100 (README); photos of 100 kB, 60 a second and CPU.
EMBED = Stage("embed", 256, device_s=1 / 14_374, cpu_s=1 / 60, bytes_in=100_000, driver_bytes=300)
SCORE = Stage("score", 65_536, device_s=1 / 3_400_000, driver_bytes=24)


def block_seconds(stage: Stage, cluster: Cluster, n_units: int) -> tuple[float, str]:
    """Seconds of a worker for a block, and which resource decides them."""
    parts = {
        "device": n_units * stage.device_s,
        "CPUs": n_units * stage.cpu_s / cluster.cpus_per_worker,
        "network": n_units * stage.bytes_in / cluster.bytes_per_s,
        "requests": n_units * cluster.latency_s / READERS if stage.bytes_in else 0.0,
    }
    slowest = max(parts, key=lambda name: parts[name])
    # Requests under way double from one to READERS, each time after one latency.
    ramp = cluster.latency_s * math.log2(READERS) if stage.bytes_in else 0.0
    return parts[slowest] + ramp + cluster.call_s, slowest


def simulate(stage: Stage, cluster: Cluster, n_units: int, in_flight: int = 2) -> Outcome:
    """Run `n_units` of a stage through the model."""
    n_blocks = math.ceil(n_units / stage.per_block)
    simulated = min(n_blocks, max(MOST_EVENTS, 4 * cluster.n_workers))
    work, slowest = block_seconds(stage, cluster, min(stage.per_block, n_units))
    free = [0.0] * cluster.n_workers
    """When each worker has finished what it was given."""
    driver, handed_out, busy = 0.0, 0, 0.0
    events: list[tuple[float, int]] = []

    def hand_out(worker: int) -> None:
        nonlocal driver, handed_out
        driver += stage.driver_s / 2
        free[worker] = max(free[worker], driver) + work
        heapq.heappush(events, (free[worker], worker))
        handed_out += 1

    for worker in list(range(cluster.n_workers)) * in_flight:
        if handed_out < simulated:
            hand_out(worker)
    half_way = 0.0
    for done in range(1, simulated + 1):
        ended, worker = heapq.heappop(events)
        driver = max(driver, ended)
        if handed_out < simulated:
            hand_out(worker)  # before the result is taken, as fan_out does
        driver += stage.driver_s / 2
        busy += stage.driver_s
        half_way = driver if done == simulated // 2 else half_way
    rest = (n_blocks - simulated) * (driver - half_way) / max(1, simulated - simulated // 2)
    seconds, share = driver + rest, min(1.0, busy / driver)
    efficiency = n_blocks * work / ((seconds) * cluster.n_workers)
    bottleneck = "driver" if share > 0.95 else "too few blocks" if efficiency < 0.8 else slowest
    driver_bytes = PROCESS_BYTES + n_units * stage.driver_bytes
    return Outcome(seconds + cluster.start_s, share, bottleneck, efficiency, driver_bytes)


def linear_up_to(stage: Stage, cluster: Cluster, n_units: int, least: float = 0.8) -> int:
    """The most workers, a power of two, that still use `least` of their time."""
    n_workers = 1
    while n_workers < 1 << 14:
        more = replace(cluster, n_workers=2 * n_workers)
        if simulate(stage, more, n_units).efficiency < least:
            break
        n_workers *= 2
    return n_workers


def table(cluster: Cluster, sizes: Sequence[int], workers: Sequence[int]) -> str:
    """Embedding and scoring (50 pairs an image) of so many images on so many workers, as Markdown."""
    lines = ["| stage | images | workers | hours | price | bottleneck | efficiency | driver memory |", "|" + "---|" * 8]
    for stage, per_image in ((EMBED, 1), (SCORE, 50)):
        for n_images in sizes:
            for n_workers in workers:
                found = simulate(stage, replace(cluster, n_workers=n_workers), n_images * per_image)
                hours = found.seconds / 3600
                price = hours * n_workers * cluster.price_per_hour
                lines.append(
                    f"| {stage.name} | {n_images:.0e} | {n_workers} | {hours:.2f} | {price:.0f} | {found.bottleneck} | "
                    f"{found.efficiency:.2f} | {found.driver_bytes / 1e9:.1f} GB |"
                )
    return "\n".join(lines)


def check(
    workers: Sequence[int] = (1, 2, 4, 8), n_blocks: int = 64, seconds: float = 0.2
) -> list[tuple[int, float, float]]:
    """For each number of workers: seconds that sleeping blocks take on real Ray workers, and what the model says."""
    from distributed_rerank.cluster.fan_out import fan_out, start_workers
    from distributed_rerank.cluster.session import connect
    from distributed_rerank.config.cluster import ClusterConfig

    found = []
    stage = Stage("sleep", 1, device_s=seconds)
    for n_workers in workers:
        with connect(ClusterConfig(num_workers=n_workers, object_store_gb=0.2)) as session:
            with start_workers(session, _Sleeper, seconds) as actors:
                list(fan_out(actors, "sleep", [(number, ()) for number in range(2 * n_workers)]))  # they have started
                took = _seconds(lambda: list(fan_out(actors, "sleep", [(n, ()) for n in range(n_blocks)])))
        predicted = simulate(stage, Cluster(n_workers, start_s=0.0), n_blocks).seconds
        found.append((n_workers, took, predicted))
    return found


class _Sleeper:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def sleep(self) -> None:
        import time

        time.sleep(self._seconds)


def _seconds(run: Callable[[], object]) -> float:
    import time

    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with sleeping blocks on this machine's Ray")
    parser.add_argument("--quick", action="store_true", help="two sizes, two numbers of workers")
    parser.add_argument("--price", type=float, default=1.0, help="of a worker and hour")
    given = parser.parse_args()
    if given.check:
        for n_workers, took, predicted in check():
            print(f"{n_workers} workers: {took:.2f} s, predicted {predicted:.2f} s ({predicted / took - 1:+.1%})")
        return
    sizes = [10**5, 10**6] if given.quick else [10**n for n in range(5, 10)]
    workers = [1, 8] if given.quick else [1, 8, 64, 256, 1000]
    print(table(Cluster(1, price_per_hour=given.price), sizes, workers))
    for stage, n_units in ((EMBED, 10**8), (SCORE, 50 * 10**8)):
        print(
            f"\n{stage.name}: more than {linear_up_to(stage, Cluster(1), n_units)} workers no longer pay at 10^8 images"
        )


if __name__ == "__main__":
    main()
