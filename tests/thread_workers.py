"""Several workers of one training as threads of this process: what they compute, without what Ray costs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_rerank.training.run import train_all
from distributed_rerank.training.task import TrainingTask, TrainingWorker


def train_together(task: TrainingTask, folder: Path, world_size: int) -> list[dict[str, Any]]:
    """The last state of each worker. Nothing random may happen in a step: threads share torch's generator."""
    barrier = threading.Barrier(world_size, timeout=120)
    slots: dict[int, Tensor] = {}

    def train(rank: int) -> dict[str, Any]:
        def all_reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack([slots[other] for other in range(world_size)]).sum(dim=0)
            barrier.wait()
            return total

        try:
            return train_all(
                task, folder, TrainingWorker(rank, world_size, "cpu", all_reduce), None, lambda state, figures: None
            )
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(train, range(world_size)))
