"""Training on Ray Train: `training.run.train_all` on several workers, whose sums are added by gloo or NCCL.

The first worker keeps the states in the run's folder, as a training in one process does, and not Ray, whose own notes
have no digests. A worker that dies is replaced and all go on from the last epoch; after a killed driver the same call
with the same folder does. No run can be resumed by accident: its folder is that of the fingerprint.
"""

import functools
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from distributed_rerank.cluster.session import Session
from distributed_rerank.cluster.training_backend import OwnProcessGroupConfig
from distributed_rerank.config.cluster import RetryConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime import logs
from distributed_rerank.storage.files import disk_problem
from distributed_rerank.training.run import CHECKPOINTS, keep_state, train_all
from distributed_rerank.training.state import latest, load_latest, read_state
from distributed_rerank.training.task import Fit, State, TrainingTask, TrainingWorker

_OF_RAY = "ray"
"""In the folder of a training: Ray's notes. They are not needed again."""


class Trainer(DataParallelTrainer):
    """Ray's trainer without two helper processes that this training does not need.

    DatasetManager hands out Ray Data sets, of which there are none. PlacementGroupCleaner frees the workers' resources
    when the controller dies, but `fit` then fails, and Ray frees them with the job; with a second Ray on the machine
    the cleaner ends with a traceback.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C stays KeyboardInterrupt: Ray's handler ends the process with exit code 1 and without a word."""


def join_workers(timeout: timedelta) -> TrainingWorker:
    """This worker of Ray's, in one process group with the others (NCCL on GPUs, else gloo)."""
    context, device = ray.train.get_context(), get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with socket.socket() as any_free_port:
        any_free_port.bind(("", 0))
        address = f"tcp://{ray.util.get_node_ip_address()}:{any_free_port.getsockname()[1]}"
    address = broadcast_from_rank_zero(address)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, timeout=timeout, world_size=world_size, rank=rank)
    return TrainingWorker(rank, world_size, str(device), all_reduce)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of the workers' tensors, given to all."""
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def train_worker(task: TrainingTask, folder: Path, timeout: timedelta, about: dict[str, Any]) -> str | None:
    """Trains as one of Ray's workers.

    Returns the message of a BadInput, and that of a full disk: raised, they would count as failures and be retried.
    """
    logs.configure_worker()
    worker = join_workers(timeout)
    # One worker decides which state is the last good one.
    last = broadcast_from_rank_zero(latest(folder / CHECKPOINTS) if worker.rank == 0 else None)
    restored = None if last is None else read_state(last)
    try:
        with logs.about(**about):
            train_all(task, folder, worker, restored, functools.partial(report, worker, folder))
    except BadInput as error:
        return str(error)
    except OSError as error:
        if line := disk_problem(error):
            return line
        raise
    return None


def report(worker: TrainingWorker, folder: Path, state: State, figures: dict[str, float]) -> None:
    """The first worker keeps the state; then all hand their figures to Ray and wait for each other."""
    if worker.rank == 0:
        keep_state(state, folder)
    ray.train.report(figures)


def fit(task: TrainingTask, folder: Path, *, session: Session, retry: RetryConfig | None = None) -> State:
    """Trains on the session's workers and returns the last state; goes on from the last epoch in `folder`.

    `folder` must be one that all workers reach. Raises BadInput as `train_all` and `require_shared` do, and Ray's
    TrainingFailedError when the workers failed too often or could not be had.
    """
    retry = retry or RetryConfig()
    # Reports wait until the controller looks again, by default after 2 s: longer than an epoch on cached encodings.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    folder = folder.absolute()
    require_shared(folder)
    shutil.rmtree(folder / _OF_RAY, ignore_errors=True)
    trainer = Trainer(
        # Bound to the function and not `train_loop_config`, which the controller reads, importing all that is in it.
        functools.partial(train_worker, task, folder, timedelta(seconds=retry.timeout_s), logs.now_about()),
        backend_config=OwnProcessGroupConfig(),
        scaling_config=ScalingConfig(
            num_workers=retry.workers(session.num_workers),
            use_gpu=session.use_gpu,
            resources_per_worker={"CPU": session.cpus_per_worker} | ({"GPU": 1} if session.use_gpu else {}),
            elastic_resize_monitor_interval_s=retry.resize_check_s,
        ),
        run_config=RunConfig(
            name=_OF_RAY,
            storage_path=str(folder),
            failure_config=FailureConfig(
                max_failures=retry.max_failures, controller_failure_limit=retry.controller_failure_limit
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result = trainer.fit()
    if result.return_value is not None:
        raise BadInput(result.return_value)
    state = load_latest(folder / CHECKPOINTS)
    assert state is not None, "a finished training has a state"
    return state


def require_shared(folder: Path) -> None:
    """Raises BadInput for a folder that a node with CPUs does not see; it names the node."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        is_there: Any = ray.remote(num_cpus=0)(Path.is_file)
        answers = [
            is_there.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                marker
            )
            for node in nodes
        ]
        unseen = [node["NodeManagerAddress"] for node, seen in zip(nodes, ray.get(answers), strict=True) if not seen]
    finally:
        marker.unlink()
    if unseen:
        raise BadInput(
            f"{folder} is not seen by node {unseen[0]}, and training on several nodes needs a folder that all of them "
            "mount; give one as --out (for a URI as --scratch), or train on one machine: submit --driver-gpus 1 ... "
            "--num-workers 0"
        )


def fit_on(session: Callable[[], Session], retry: RetryConfig) -> Fit:
    """Training on the workers of the session."""
    return lambda task, folder: fit(task, folder, session=session(), retry=retry)
