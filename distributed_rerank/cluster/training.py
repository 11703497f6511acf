"""Training on Ray Train: `training.run.train_all` on several workers, whose sums are added by gloo or
NCCL.

Ray keeps the checkpoints under the run's folder. A worker that dies is replaced and all go on from the last
epoch; after a killed driver the same call with the same folder does. The run has no name of its own to reuse
by accident: its folder is that of the fingerprint.
"""

import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import Tensor

from distributed_rerank.cluster.quiet import quieten
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.cluster import RetryConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime import logs
from distributed_rerank.training.run import train_all
from distributed_rerank.training.state import read_state, write_state
from distributed_rerank.training.task import State, TrainingTask, TrainingWorker

logger = logging.getLogger(__name__)

STATE = "state.pt"


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of the workers' tensors, given to all."""
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def train_worker(arguments: dict) -> str | None:
    """What each Ray worker does. Returns the message of a BadInput: raised, it would count as a failure and
    be retried."""
    task: TrainingTask = arguments["task"]
    logs.configure_worker()
    quieten()
    context = ray.train.get_context()
    worker = TrainingWorker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(get_device()),
        all_reduce=all_reduce,
    )
    found = ray.train.get_checkpoint()
    restored = None
    if found is not None:
        with found.as_directory() as folder:
            restored = read_state(Path(folder) / STATE)
    try:
        train_all(task, arguments["folder"], worker, restored, functools.partial(report, worker))
    except BadInput as error:
        return str(error)
    return None


def report(worker: TrainingWorker, state: State, figures: dict[str, float]) -> None:
    """Hands the epoch's figures to Ray, and the state from the first worker; all workers wait for each
    other."""
    if worker.rank != 0:
        ray.train.report(figures, checkpoint=None)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_state(state, Path(folder) / STATE)
        ray.train.report(figures, checkpoint=Checkpoint.from_directory(folder))


def fit(task: TrainingTask, folder: Path, *, session: Session, retry: RetryConfig | None = None) -> State:
    """Trains on the session's workers and returns the last state; goes on from the last epoch that is in
    `folder`.

    `folder` must be one that all workers reach. Raises BadInput as `train_all` does, and Ray's
    TrainingFailedError when the workers failed too often or could not be had.
    """
    retry = retry or RetryConfig()
    # Reports wait for the controller's next look, by default 2 s: longer than an epoch on cached encodings.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    folder = folder.absolute()
    resources = {"CPU": session.cpus_per_worker} | ({"GPU": 1} if session.use_gpu else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task, "folder": folder},
        scaling_config=ScalingConfig(
            num_workers=retry.workers(session.num_workers),
            use_gpu=session.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=retry.resize_check_s,
        ),
        torch_config=TorchConfig(backend="nccl" if session.use_gpu else "gloo", timeout_s=retry.timeout_s),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(
                max_failures=retry.max_failures, controller_failure_limit=retry.controller_failure_limit
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result = trainer.fit()
    if result.return_value is not None:
        raise BadInput(result.return_value)
    assert result.checkpoint is not None, "a finished training has a checkpoint"
    with result.checkpoint.as_directory() as last:
        return read_state(Path(last) / STATE)


def fit_on(session: Callable[[], Session], retry: RetryConfig) -> Callable[[TrainingTask, Path], State]:
    """Training on the workers of the session."""
    return lambda task, folder: fit(task, folder, session=session(), retry=retry)
