"""One epoch of training for any pairwise model, on one device, whoever else takes part. Layer 3.

Every worker walks through the same steps and takes its share of each. What it computes are sums over its own
pairs divided by the count of the whole step; `all_reduce` adds the sums of all workers, loss and gradients in
one flat tensor. So the result is that of one worker with all pairs, up to the rounding of a sum, for any
number of workers.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.training.features import CachedPairFeatures
from distributed_rerank.training.losses import step_loss
from distributed_rerank.training.plan import Step, is_list_loss, seed_of, share_of
from distributed_rerank.training.state import TrainingState, schedule_factor, set_training


def alone(tensor: Tensor) -> Tensor:
    """The sum over one worker."""
    return tensor


@dataclass(frozen=True)
class Worker:
    """Who trains: one of `world_size` workers, and how their sums are added."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    all_reduce: Callable[[Tensor], Tensor] = alone
    """Gives the sum of every worker's tensor to all; called by all workers equally often."""


@runtime_checkable
class ImageSource(Protocol):
    """Where the images of a step come from: decoded files, or encodings computed before."""

    is_encoded: bool

    def fetch(self, items: Tensor, epoch: int, step: int) -> Tensor:
        """One row for each item: pixels uint8 [n, 3, h, w], or encodings where `is_encoded`."""
        ...


def pair_logits(model: PairwiseModel, images: Tensor, is_encoded: bool, step: Step, items: Tensor) -> Tensor:
    """Logits of the step's pairs from one row per image of `items` (ascending); each image is encoded
    once."""
    encoded = images if is_encoded else model.encode(images)
    device = encoded.device
    query = torch.searchsorted(items, step.query_items).to(device)
    gallery = torch.searchsorted(items, step.gallery_items).to(device)
    return model(encoded[query], encoded[gallery], step.first_stage_distance.to(device)).float()


def train_epoch(
    state: TrainingState,
    steps: list[Step],
    images: ImageSource,
    config: TrainingConfig,
    worker: Worker,
    after_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> list[float]:
    """Trains through `steps` and returns the loss of each, a mean over the whole step on every worker.

    `state` moves on by one epoch. Dropout and augmentation are derived from (seed, epoch, step), so that an
    epoch started from a checkpoint is the same as in a run that was never stopped; torch's generator is put
    back after it.
    """
    set_training(state.model, config.is_frozen(state.epoch))
    n_steps = config.epochs * len(steps)
    shares = [share_of(step, worker.rank, worker.world_size, is_list_loss(config.loss)) for step in steps]
    reported = []
    with torch.random.fork_rng(devices=[worker.device] if worker.device.startswith("cuda") else []):
        for number, (share, items, pixels) in enumerate(prefetch_steps(shares, images, state.epoch, config)):
            factor = schedule_factor(state.step, n_steps, config)
            for group in state.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            seed = seed_of(config.seed, state.epoch, number, worker.rank)
            n_units = steps[number].n_units(config.loss)
            own = backward(state, share, items, pixels.to(worker.device), images, n_units, config, seed)
            loss, norm = all_reduce_and_step(state, own, config, worker)
            if not math.isfinite(loss):
                raise BadInput(f"the loss is {loss} in step {number} of epoch {state.epoch}; lower lr={config.lr}")
            state.step += 1
            reported.append(loss)
            after_step(state.step, {"loss": loss, "gradient_norm": norm, "lr": config.lr * factor})
    state.epoch += 1
    return reported


def prefetch_steps(
    shares: list[Step], images: ImageSource, epoch: int, config: TrainingConfig
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Each share with the items of its pairs (ascending, once each) and their images, prefetch_steps one step
    ahead."""
    wanted = [items_of(share) for share in shares]
    if config.loader_workers == 0:
        for number, (share, items) in enumerate(zip(shares, wanted, strict=True)):
            yield share, items, images.fetch(items, epoch, number)
        return
    with ThreadPoolExecutor(max_workers=1) as ahead:
        coming = ahead.submit(images.fetch, wanted[0], epoch, 0) if shares else None
        for number, (share, items) in enumerate(zip(shares, wanted, strict=True)):
            assert coming is not None, "a step was not prefetch_steps"
            pixels = coming.result()
            if number + 1 < len(shares):
                coming = ahead.submit(images.fetch, wanted[number + 1], epoch, number + 1)
            yield share, items, pixels


def items_of(step: Step) -> Tensor:
    """The items of the step's pairs, ascending, once each."""
    return torch.unique(torch.cat([step.query_items, step.gallery_items]))


def backward(
    state: TrainingState,
    share: Step,
    items: Tensor,
    pixels: Tensor,
    images: ImageSource,
    n_units: int,
    config: TrainingConfig,
    seed: int,
) -> Tensor:
    """Adds the gradients of this worker's share of the mean loss to the parameters; returns the share of the
    loss."""
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=pixels.device)
    for number in range(config.accumulation):
        part = share_of(share, number, config.accumulation, is_list_loss(config.loss))
        if len(part) == 0:
            continue
        torch.manual_seed(seed + number)
        if isinstance(images, CachedPairFeatures):
            logits = images.logits(part.query_items, part.gallery_items, part.first_stage_distance)
        else:
            # Only the part's own images: those of the whole share would need the memory that is to be saved.
            own = items_of(part)
            rows = torch.searchsorted(items, own).to(pixels.device)
            logits = pair_logits(state.model, pixels[rows], images.is_encoded, part, own)
        loss = step_loss(part, logits, config, n_units)
        loss.backward()
        total += loss.detach()
    return total


def all_reduce_and_step(
    state: TrainingState, own_loss: Tensor, config: TrainingConfig, worker: Worker
) -> tuple[float, float]:
    """Adds up the workers' losses and gradients in one collective and takes the optimizer's step.

    Returns the step's loss and the norm of its gradient before clipping. A worker without a pair adds zeros.
    """
    trained = [
        parameter for group in state.optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
    ]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = worker.all_reduce(torch.cat([own_loss.reshape(1), *(g.float().reshape(-1) for g in gradients)]))
    sizes = [parameter.numel() for parameter in trained]
    for parameter, gradient in zip(trained, flat[1:].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm or math.inf)
    state.optimizer.step()
    return float(flat[0]), float(norm)
