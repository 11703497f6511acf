"""Connect to Ray, or start it on this machine, and find out what work can be placed there.

With RAY_ADDRESS set (as in `ray job submit`) the running cluster is used; otherwise a private instance is
started and stopped again. It never joins a Ray that happens to run on the machine.
"""

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray._private import services
from ray._private import utils as ray_utils
from ray.exceptions import AuthenticationError

from distributed_rerank.cluster.growth import room
from distributed_rerank.cluster.quiet import quieten
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime import logs
from distributed_rerank.storage import locks

logger = logging.getLogger(__name__)

_FOLDER_PREFIX = "rerank-ray-"
_LOCK = "lock"
_DISK_LEFT = 2 * 10**9  # bytes of the disk of /tmp that Ray leaves free
_MIN_LOGICAL_CPUS = 8
"""A small machine declares more CPUs than it has: Ray Data hangs where actors hold every CPU (ray issue
44687)."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a connected driver may use. Bits never depend on it, only time does."""

    num_workers: int
    """Workers that compute."""
    cpus_per_worker: int = 1
    """CPUs reserved for each of them."""
    use_gpu: bool = False
    """Whether each of them holds a GPU."""
    num_cpus: int = _MIN_LOGICAL_CPUS
    """CPUs that the cluster declares."""
    decode_workers: int = 2
    """At most this many processes decode images beside the workers."""
    object_store_bytes: int = 10**9
    """Shared memory of the cluster."""


@contextmanager
def connect(config: ClusterConfig | None = None, metrics_port: int | None = None) -> Iterator[Session]:
    """The session of this job; a Ray started here ends with the block, a SIGTERM ends it as Ctrl-C does.

    Such a Ray tells its metrics at `metrics_port`; None = nowhere.

    Raises BadInput when RAY_ADDRESS does not answer, when no Ray can be started here, or when the workers asked for do
    not fit the cluster.
    """
    config = config or ClusterConfig()
    logs.configure_driver()
    quieten()
    with ExitStack() as stack:
        is_local = False
        if not ray.is_initialized():
            is_local = os.environ.get("RAY_ADDRESS", "local") == "local"
            with _interrupted_later():
                stack.enter_context(_start_local(config, metrics_port) if is_local else _attach())
        stack.enter_context(_interrupt_on_sigterm())
        if not is_local:
            stack.enter_context(room(config))
        session = make_session(config, ray.cluster_resources(), cores=_cores() if is_local else None)
        logger.info("Ray: %d workers, %s", session.num_workers, "one GPU each" if session.use_gpu else "CPU")
        yield session


def make_session(config: ClusterConfig, resources: Mapping[str, float], *, cores: int | None = None) -> Session:
    """What `config` means on a cluster with these Ray `resources`; `cores` are the real ones where CPUs are
    only declared.

    Raises BadInput naming what was asked for and what there is.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    most = min(gpus, cpus // config.cpus_per_worker) if use_gpu else cpus // config.cpus_per_worker
    default = min(most, (cores or cpus) // config.cpus_per_worker) if not use_gpu else most
    num_workers = config.num_workers or max(1, default)
    if num_workers > most:
        each = f"{config.cpus_per_worker} CPU{' and 1 GPU' if use_gpu else ''}"
        raise BadInput(
            f"{num_workers} workers with {each} each were asked for, the cluster has {cpus} CPUs and "
            f"{gpus} GPUs; lower num_workers, or give wait_s where the cluster can grow"
        )
    return Session(
        num_workers=num_workers,
        cpus_per_worker=config.cpus_per_worker,
        use_gpu=use_gpu,
        num_cpus=cpus,
        decode_workers=cores or cpus,
        object_store_bytes=int(resources.get("object_store_memory", 0)),
    )


@contextmanager
def _start_local(config: ClusterConfig, metrics_port: int | None) -> Iterator[None]:
    """A private Ray of this process: own folder, own token, no dashboard."""
    _remove_left_behind()
    # /tmp and not TMPDIR: Ray's socket paths must stay below 107 characters
    # Ray makes its own folder writable for everybody, so it lies in one that only this user may enter.
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir="/tmp"))
    lock = locks.wait_for(folder / _LOCK)
    needed = (config.num_workers or 0) * config.cpus_per_worker + 2
    _use_own_token()
    # A private Ray of one machine loses no node with notice, so training needs no process that watches for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray stops writing to a disk that is 95 % full and says so every 10 s, though a large one has room left then.
    full = 1 - _DISK_LEFT / shutil.disk_usage(folder).total
    os.environ.setdefault("RAY_local_fs_capacity_threshold", f"{max(0.95, full):.4f}")
    try:
        with _without_metrics_port() if metrics_port is None else nullcontext():
            _init(
                address="local",
                num_cpus=max(_MIN_LOGICAL_CPUS, 2 * _cores(), needed),
                object_store_memory=None if config.object_store_gb is None else int(config.object_store_gb * 10**9),
                include_dashboard=False,
                logging_level=logging.WARNING,
                runtime_env={"worker_process_setup_hook": "distributed_rerank.cluster.quiet.quieten"},
                _metrics_export_port=metrics_port,
                _temp_dir=str(folder / "ray"),
            )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _init(**options: Any) -> None:
    try:
        ray.init(**options)
    except (RuntimeError, OSError, ValueError, TimeoutError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(
            f"Ray cannot be started here ({reason}); --num-workers 0 computes in this process without it"
        ) from error


@contextmanager
def _without_metrics_port() -> Iterator[None]:
    """Ray started inside opens no port for metrics, which anybody on the network could read without the token.

    The agent of a node has a switch for it, and ray.init none, so the switch is added where the raylet is started.
    """
    start = services.start_ray_process

    def start_without(command: list[Any], *arguments: Any, **options: Any) -> Any:
        words = [
            f"{word} --disable-metrics-collection" if str(word).startswith("--dashboard_agent_command=") else word
            for word in command
        ]
        return start(words, *arguments, **options)

    services.start_ray_process = start_without
    try:
        yield
    finally:
        services.start_ray_process = start


def _remove_left_behind() -> None:
    """Remove the folders of drivers that were killed: the kernel has freed the locks that they held."""
    for folder in Path("/tmp").glob(f"{_FOLDER_PREFIX}*"):
        try:
            # Without a lock file it is not one of these, or just being made.
            lock = locks.take(folder / _LOCK) if (folder / _LOCK).is_file() else None
        except OSError:
            lock = None
        if lock is None:
            logger.debug("%s is in use or not ours", folder)
            continue
        with lock:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _attach() -> Iterator[None]:
    address = os.environ["RAY_ADDRESS"]
    try:
        observed = {logs.OBSERVED: os.environ[logs.OBSERVED]} if logs.OBSERVED in os.environ else {}
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": observed} if observed else None)
    except (ConnectionError, AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"RAY_ADDRESS={address} cannot be used ({reason}); start that cluster, set its RAY_AUTH_TOKEN, or unset it"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _use_own_token() -> None:
    """Otherwise Ray, which turns authentication on by itself, writes a world-readable token into the home.

    The token stays for the life of the process, because Ray keeps the first one it has read.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """SIGTERM and Ctrl-C inside raise KeyboardInterrupt, at once and once more when the block is left.

    While Ray starts, its callbacks may swallow the first. Ray's own handlers, which come to nothing then, stay away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt(f"signal {number}")

    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, interrupt) for number in heard}
    of_ray = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = of_ray
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if came:
        raise KeyboardInterrupt(f"signal {came[0]}")


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that workers are stopped and finished blocks kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    before: Any = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
