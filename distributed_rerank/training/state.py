"""The state of a training run: what an uninterrupted run would know at the end of an epoch, and its files.

A state is what `TrainingState.to_dict` gives: tensors, numbers, strings, lists and dicts. It is written beside its
final name and renamed, so that a kill never leaves half of one, and read with `weights_only=True`, so that loading runs
no pickled code.
"""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.storage.artifacts import set_aside
from distributed_rerank.storage.files import is_intact, remove_sealed, sealed_path

PROGRESS = ("epoch", "step", "history", "best", "plan_digest", "order")
"""Fields of a state beside its model and optimizer."""
EPOCH_FILE = re.compile(r"epoch-(\d{5})\.pt")


@dataclass
class TrainingState:
    """All that an uninterrupted run would know after `epoch` epochs."""

    model: PairwiseModel
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """Of the best epoch so far: figure, epoch, model (a state dict), logits of the set-aside lists."""
    plan_digest: str = ""
    order: Tensor | None = None
    """The last result of `validation.mine_again`; None = the first mining's lists."""

    def to_dict(self) -> dict[str, Any]:
        """Everything by value, for a checkpoint; no random state, which is derived from (seed, epoch, step)."""
        return {
            "model": state_copy(self.model),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `to_dict` was called."""
        load_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in PROGRESS:
            setattr(self, name, state[name])


def state_copy(model: PairwiseModel) -> dict[str, Tensor]:
    """The state dict on the CPU, by value; without the backbone while it is frozen and so as it was at the start."""
    state = model.state_dict()
    kept = [name for name in state if not (model.is_backbone_frozen and name.startswith("extractor."))]
    return {name: state[name].detach().cpu().clone() for name in kept}


def load_state(model: PairwiseModel, state: dict[str, Tensor]) -> None:
    """Loads a result of `state_copy`; a backbone that was left out stays as it is."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"the state has {unexpected}, the model has not"
    assert all(name.startswith("extractor.") for name in missing), f"the state lacks {missing}"


def build_optimizer(model: PairwiseModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; backbone and head at their own rates, vectors without decay.

    Parameters that are frozen when this is called are left out. Raises BadInput where all are frozen.
    """
    groups = []
    for group in model.parameter_groups(config.lr, config.backbone_lr):
        for is_vector in (False, True):
            parameters = [p for p in group["params"] if (p.ndim < 2) == is_vector]
            decay = 0.0 if is_vector else config.weight_decay
            if parameters:
                groups.append({**group, "params": parameters, "base_lr": group["lr"], "weight_decay": decay})
    if not groups:
        raise BadInput("this model has nothing to train while its backbone is frozen; give a backbone_lr above 0")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    # One pass over the parameters instead of a dozen; on a CPU it is also the only one that uses all threads for each.
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def freeze_encoder(model: PairwiseModel) -> None:
    """Freezes everything that cached encodings were made with: the backbone, and whatever `forward` does not use.

    Raises BadInput for a model without parameters.
    """
    model.freeze_backbone()
    first = next(model.parameters(), None)
    if first is None:
        raise BadInput(f"{type(model).__name__} has no parameters, so there is nothing to train; choose another model")
    device = first.device
    encoding = torch.zeros(1, *model.encoding_shape, dtype=model.encoding_dtype, device=device)
    model.eval()
    # A parameter that gets no gradient from a logit is not used by `forward`.
    logit = model(encoding, encoding, torch.ones(1, device=device)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    reached = torch.autograd.grad(logit, parameters, allow_unused=True) if logit.requires_grad else ()
    for parameter, gradient in zip(parameters, reached, strict=bool(reached)):
        parameter.requires_grad_(gradient is not None)


def schedule_factor(step: int, n_steps: int, config: TrainingConfig) -> float:
    """Multiplier of the learning rates in step 0, 1, ...: linear warm-up, then constant or half a cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps)
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, progress), dtype=torch.float64))))


def set_training(model: PairwiseModel, is_frozen: bool) -> None:
    """Training mode, with the backbone frozen or not: frozen, nothing in it changes, buffers included."""
    if is_frozen:
        model.freeze_backbone()
    else:
        model.unfreeze_backbone()
    model.train()


def write_state(state: dict[str, Any] | Tensor, path: Path) -> None:
    """Writes `state` atomically and flushed to disk, with its digest. Raises OSError where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save(state, content)  # into memory, for on a full disk it raises errors of its own
    with sealed_path(path) as unfinished:
        unfinished.write_bytes(content.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    """The state at `path`, its tensors on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save_epoch(state: dict[str, Any], folder: Path, epoch: int, keep: int = 2) -> None:
    """Writes the state after `epoch` epochs and removes all but the last `keep`."""
    write_state(state, _epoch_path(folder, epoch))
    for old in saved_epochs(folder)[:-keep]:
        remove_sealed(_epoch_path(folder, old))


def saved_epochs(folder: Path) -> list[int]:
    """Numbers of the epochs whose states lie complete in `folder`, ascending; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(int(name[1]) for entry in folder.iterdir() if (name := EPOCH_FILE.fullmatch(entry.name)))


def latest(folder: Path) -> Path | None:
    """The state of the last complete epoch, or None where there is none. Damaged ones are set aside by name."""
    for epoch in reversed(saved_epochs(folder)):
        path = _epoch_path(folder, epoch)
        if is_intact(path):
            return path
        set_aside(path, "it is not what was written")
    return None


def load_latest(folder: Path) -> dict[str, Any] | None:
    """What `latest` finds, read."""
    path = latest(folder)
    return None if path is None else read_state(path)


def _epoch_path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:05d}.pt"
