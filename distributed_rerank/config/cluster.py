"""Which part of a cluster a job may use, and how much it puts up with."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distributed_rerank.errors import BadInput, check_numbers


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which part of the cluster a job may use."""

    num_workers: int | None = None
    """Ray workers; 0 = no Ray, all in this process. Default: one for each GPU, or for each CPU core without GPUs;
    a cluster without any yet is asked for the first."""
    cpus_per_worker: int = 1
    """CPUs reserved for each worker."""
    use_gpu: bool | None = None
    """Give each worker a GPU. Default: where the cluster has any."""
    object_store_gb: float | None = None
    """Shared memory in GB of a Ray started here. Default: 30 % of the machine's memory."""
    scratch: Path = Path("~/.cache/distributed_rerank")
    """Folder on this machine for copies of what is read from buckets, and for results on their way there."""
    wait_s: float | None = None
    """Seconds to wait for a cluster that can grow to start the nodes that the workers need. Default: 900."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise BadInput(f"num_workers={self.num_workers} is negative; give 1 or more, or 0 for this process alone")
        if self.cpus_per_worker < 1:
            raise BadInput(f"cpus_per_worker={self.cpus_per_worker}: give 1 or more")
        if self.object_store_gb is not None and self.object_store_gb < 0.1:
            raise BadInput(f"object_store_gb={self.object_store_gb} is too small for image blocks; give 0.1 or more")
        if self.wait_s is not None and self.wait_s < 0:
            raise BadInput(f"wait_s={self.wait_s} is negative; give 0 or more seconds")
        check_numbers(self, "object_store_gb wait_s")


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What a run tells of itself while it works. It changes no bit."""

    log_format: Literal["text", "json"] = "text"
    """json: each log line of driver and workers is an object with time, level, job, stage, block (its number, or those
    of one call) and message."""
    profile: Path | None = None
    """Folder for Chrome traces (Perfetto) of a block on each kind of worker: embed, search, score, train. On a cluster
    it is one on each node."""

    def __post_init__(self) -> None:
        if self.profile is not None and re.match(r"\w+:/", str(self.profile)):
            raise BadInput(f"--profile {self.profile}: traces are written on this machine only; give a path")


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """How many failures a training survives."""

    max_failures: int = 3
    """Worker failures after which training gives up; each costs the epoch that it happened in."""
    controller_failure_limit: int = 3
    """Times that Ray may fail to get the workers' resources."""
    min_workers: int | None = None
    """Go on with as few workers while a node is away, with all once it is back. Default: wait for all."""
    resize_check_s: float = 60.0
    """Seconds between two looks for more workers (min_workers)."""
    timeout_s: int = 1800
    """Seconds that workers wait for each other; must exceed the slowest share of encoding or validation."""

    def __post_init__(self) -> None:
        for name in ("max_failures", "controller_failure_limit"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name}={getattr(self, name)} has no end; give 0 or more")
        check_numbers(self, "resize_check_s timeout_s", above=0)
        if self.min_workers is not None and self.min_workers < 1:
            raise BadInput(f"min_workers={self.min_workers} trains nothing; give at least 1")

    def workers(self, most: int) -> int | tuple[int, int]:
        """Ray's num_workers for up to `most`. Raises BadInput where fewer than `min_workers` were asked for."""
        if self.min_workers is None or self.min_workers == most:
            return most
        if self.min_workers > most:
            raise BadInput(f"min_workers={self.min_workers} exceeds num_workers={most}; lower it or raise num_workers")
        return (self.min_workers, most)
