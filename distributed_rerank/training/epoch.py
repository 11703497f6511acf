"""One epoch of training for any pairwise model, on one device, alone or together with other workers.

Every worker walks through the same steps and takes its share of each. It computes sums over its own pairs, divided by
the count of the whole step; `all_reduce` adds the sums of all workers, loss and gradients in one flat tensor. So the
result of any number of workers is that of one worker with all pairs, up to the rounding of a sum.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.profiling import traced
from distributed_rerank.training.images import CachedPairFeatures, DecodedImages, TrainingImages
from distributed_rerank.training.losses import step_loss
from distributed_rerank.training.plan import TrainingStep, is_list_loss, seed_of, share_of
from distributed_rerank.training.state import TrainingState, schedule_factor, set_training
from distributed_rerank.training.task import TrainingWorker


def train_epoch(
    state: TrainingState,
    steps: list[TrainingStep],
    images: TrainingImages,
    config: TrainingConfig,
    worker: TrainingWorker,
    after_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> list[float]:
    """Trains through `steps` and returns the loss of each, a mean over the whole step on every worker.

    `state` moves on by one epoch. Dropout and augmentation are derived from (seed, epoch, step), so an epoch started
    from a checkpoint is the same as in an uninterrupted run. Torch's generator is put back afterwards. Raises BadInput
    where the loss becomes infinite or NaN.
    """
    set_training(state.model, config.is_frozen(state.epoch))
    n_steps = config.epochs * len(steps)
    shares = [share_of(step, worker.rank, worker.world_size, is_list_loss(config.loss)) for step in steps]
    losses = []
    with torch.random.fork_rng(devices=[worker.device] if worker.device.startswith("cuda") else []):
        for number, (share, items, pixels) in enumerate(prefetch_steps(shares, images, state.epoch, config)):
            factor = schedule_factor(state.step, n_steps, config)
            for group in state.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            seed = seed_of(config.seed, state.epoch, number, worker.rank)
            n_units = steps[number].n_units(config.loss)
            with traced("train"):
                own_loss = backward(state, share, items, pixels.to(worker.device), images, n_units, config, seed)
                loss, norm = all_reduce_and_step(state, own_loss, config, worker)
            if not math.isfinite(loss):
                raise BadInput(f"the loss is {loss} in step {number} of epoch {state.epoch}; lower lr={config.lr}")
            state.step += 1
            losses.append(loss)
            after_step(state.step, {"loss": loss, "gradient_norm": norm, "lr": config.lr * factor})
    state.epoch += 1
    return losses


def prefetch_steps(
    shares: list[TrainingStep], images: TrainingImages, epoch: int, config: TrainingConfig
) -> Iterator[tuple[TrainingStep, Tensor, Tensor]]:
    """Each share with the items of its pairs (ascending, once each) and their images, fetched one step ahead."""
    items = [items_of(share) for share in shares]
    if not isinstance(images, DecodedImages) or images.pool is None:
        for number, share in enumerate(shares):
            yield share, items[number], images.fetch(items[number], epoch, number)
        return
    with ThreadPoolExecutor(max_workers=1) as ahead:
        coming = ahead.submit(images.fetch, items[0], epoch, 0) if shares else None
        for number, share in enumerate(shares):
            assert coming is not None, "a step was not prefetched"
            pixels = coming.result()
            if number + 1 < len(shares):
                coming = ahead.submit(images.fetch, items[number + 1], epoch, number + 1)
            yield share, items[number], pixels


def items_of(step: TrainingStep) -> Int64[Tensor, " item"]:
    """The items of the step's pairs, ascending, once each."""
    return torch.unique(torch.cat([step.query_items, step.gallery_items]))


def backward(
    state: TrainingState,
    share: TrainingStep,
    items: Int64[Tensor, " item"],
    pixels: Tensor,
    images: TrainingImages,
    n_units: int,
    config: TrainingConfig,
    seed: int,
) -> Float[Tensor, ""]:
    """Adds the gradients of this worker's share of the mean loss to the parameters; returns that share of the loss.

    `pixels` has one row for each of `items`: pixels, or encodings where `images.is_encoded`.
    """
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
            own_items = items_of(part)
            own_pixels = pixels[torch.searchsorted(items, own_items).to(pixels.device)]
            # Each image is encoded once; the pairs pick rows of `encoded`.
            encoded = own_pixels if images.is_encoded else state.model.encode(own_pixels)
            query = pick_rows(encoded, torch.searchsorted(own_items, part.query_items))
            gallery = pick_rows(encoded, torch.searchsorted(own_items, part.gallery_items))
            logits = state.model(query, gallery, part.first_stage_distance.to(encoded.device)).float()
        loss = step_loss(part, logits, config, n_units)
        loss.backward()
        total += loss.detach()
    return total


def pick_rows(encoded: Tensor, rows: Int64[Tensor, " pair"]) -> Tensor:
    """`encoded[rows]`, with a gradient that is the same bits whatever the number of threads."""
    rows = rows.to(encoded.device)
    # Several threads of a CPU add up the float32 gradients of `encoded[rows]` in any order, those of float16 in one.
    return encoded.index_select(0, rows) if encoded.dtype == torch.float32 else encoded[rows]


def all_reduce_and_step(
    state: TrainingState, own_loss: Float[Tensor, ""], config: TrainingConfig, worker: TrainingWorker
) -> tuple[float, float]:
    """Adds up the workers' losses and gradients in one collective and takes the optimizer's step.

    Returns the step's loss and the norm of its gradient before clipping. A worker without a pair adds zeros.
    """
    trained = [
        parameter for group in state.optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
    ]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    # [1 + numbers in all gradients]: the loss first, then one gradient after the other.
    flat = worker.all_reduce(torch.cat([own_loss.reshape(1), *(g.float().reshape(-1) for g in gradients)]))
    sizes = [parameter.numel() for parameter in trained]
    for parameter, gradient in zip(trained, flat[1:].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm or math.inf)
    state.optimizer.step()
    return float(flat[0]), float(norm)
