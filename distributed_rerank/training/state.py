"""What an uninterrupted training run would know at the end of an epoch, and how it is kept. Layer 3."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel

PROGRESS = ("epoch", "step", "history", "best", "plan_digest", "order")
"""Fields of a state beside its model and optimizer."""


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
    """What `remining.mine_again` last found; None = the first mining's lists."""

    def to_dict(self) -> dict[str, Any]:
        """Everything by value, for a checkpoint; randomness is derived from (seed, epoch, step) and needs no
        place."""
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
    """The state dict on the CPU, by value; without the backbone while that is frozen, for then it is the
    first one."""
    state = model.state_dict()
    kept = [name for name in state if not (model.is_backbone_frozen and name.startswith("extractor."))]
    return {name: state[name].detach().cpu().clone() for name in kept}


def load_state(model: PairwiseModel, state: dict[str, Tensor]) -> None:
    """Takes what `state_copy` gave; the backbone stays as it is where it was left out."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"the state has {unexpected}, the model has not"
    assert all(name.startswith("extractor.") for name in missing), f"the state lacks {missing}"


def build_optimizer(model: PairwiseModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; backbone and head at their own rates, vectors without decay.

    Parameters that are frozen when this is called are left out.
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
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    # One pass over the parameters instead of a dozen; on a CPU it is also the only one that uses all threads for each.
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def freeze_encoder(model: PairwiseModel) -> None:
    """Freezes the backbone and whatever else `forward` does not use: all that cached encodings are made
    with."""
    model.freeze_backbone()
    device = next(model.parameters()).device
    encoding = torch.zeros(1, *model.encoding_shape, dtype=model.encoding_dtype, device=device)
    model.eval()
    logit = model(encoding, encoding, torch.ones(1, device=device)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    reached = torch.autograd.grad(logit, parameters, allow_unused=True) if logit.requires_grad else ()
    for parameter, gradient in zip(parameters, reached, strict=bool(reached)):
        parameter.requires_grad_(gradient is not None)


def schedule_factor(step: int, n_steps: int, config: TrainingConfig) -> float:
    """Multiplier of the learning rates in step 0, 1, ...: linear warm-up, then constant or half a cosine to
    0."""
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
