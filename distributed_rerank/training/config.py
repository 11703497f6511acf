"""What a training run is made of: one frozen dataclass, checked when it is made. Layer 3.

`TrainingConfig` decides the weights that come out, so all of it goes into the fingerprint of the model
folder. How many workers share the work is not part of it: the same plan is trained on by any number of them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from distributed_rerank.data.transforms import Augmentation
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_mining import NegativeFilters


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a pairwise model is trained. The defaults are for cached encodings of a frozen backbone on a
    CPU."""

    seed: int = 0
    """Decides the halves or the set-aside labels, the plan, the augmentation and the dropout."""
    epochs: int = 10
    """Each ends with a checkpoint and a validation figure."""
    steps_per_epoch: int | None = 70
    """Optimizer steps in an epoch (mining=lists); None = as many as give each anchor one list."""
    minutes: float | None = None
    """Stop after the epoch in which this much training time is over; the weights then depend on the
    machine."""
    loss: Literal["bce", "listwise", "ranknet", "margin"] = "listwise"
    """bce: each pair by itself (OML); listwise: softmax over a list; ranknet, margin: each positive against each
    negative, softly or until it is `margin` nearer."""
    margin: float = 1.0
    """Of loss=margin, in logits divided by `temperature`."""
    temperature: float = 1.0
    """Logits are divided by it in the loss; distances of length-one embeddings need about 0.1 to tell a list apart."""
    mining: Literal["lists", "batch", "whole_batch"] = "lists"
    """lists: pairs from the anchors' own candidate lists; batch: OML's balanced batches with hard pairs;
    whole_batch: every image of a balanced batch against all others, for embeddings, whose pairs cost nothing."""
    n_labels: int = 30
    """Labels in a balanced batch (mining=batch, whole_batch)."""
    n_instances: int = 4
    """Images per label in a balanced batch (mining=batch, whole_batch)."""
    lists_per_step: int = 64
    """Anchors in a step (mining=lists)."""
    n_negatives: int = 20
    """Negatives beside the one positive of a list (mining=lists)."""
    n_items: int = 50
    """Candidates retrieved per anchor; negatives and most positives are drawn from them."""
    negative_temperature: float | None = None
    """Negatives are drawn in proportion to exp(-distance / this); None = every candidate alike (mining=lists)."""
    remine_every: int = 0
    """Epochs after which the current model orders the candidates anew and negatives come from its nearest `top_n`;
    0 = never (mining=lists)."""
    share_beyond: float = 0.0
    """Share of lists whose positive is an image of the label that was not retrieved (mining=lists)."""
    filters: NegativeFilters = field(default_factory=NegativeFilters)
    """Which candidates may not be negatives, because they may be mislabelled positives (mining=lists)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9."""
    lr: float = 2e-3
    """Learning rate of everything but the backbone."""
    backbone_lr: float = 0.0
    """Learning rate of the backbone; 0 freezes it, and its encodings are then computed once."""
    freeze_epochs: int = 0
    """Epochs at the start in which the backbone is frozen whatever backbone_lr says."""
    weight_decay: float = 0.1
    """On matrices and kernels; biases, scales and other vectors have none."""
    warmup_steps: int = 70
    """Steps in which the learning rates rise linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rates go on after the warm-up; cosine reaches 0 in the last of `epochs`."""
    clip_norm: float = 1.0
    """The gradient is scaled down to this norm; 0 = never."""
    accumulation: int = 1
    """Micro-batches a step is cut into: the same gradient from less memory."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations again in the backward pass instead of keeping them: a third more time,
    a fraction of the memory."""
    teacher_share: float = 0.5
    """Weight of agreeing with the teacher, where there is one; the rest is the labels' loss."""
    teacher_temperature: float = 1.0
    """Teacher's and student's logits are divided by it before they are compared; larger = softer."""
    patience: int = 0
    """Epochs without a better validation figure after which training ends, the best weights being kept; 0 =
    it runs to its end and the last weights are kept."""
    set_aside: float = 0.25
    """Share of the train labels that a model without projections to fit is never trained on: early stopping
    and chain are chosen on them. Models with projections are trained on either half of the labels and judged
    on the other."""
    top_n: int = 50
    """Candidates of a query that the model re-ranks for the validation figure."""
    views: int = 1
    """Encodings kept of an image when the backbone is frozen: the plain one and views - 1 augmented ones."""
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    """Of the images trained on (of all but the first view when encodings are cached), at the model's own
    size; None = none."""
    score_pairs: int = 128
    """Pairs scored together for the validation figure."""
    encode_block: int = 64
    """Images encoded together where encodings are cached. Fixed, so that no worker count changes them."""
    fit_images: int = 5000
    """Images at most that projections are fitted to."""
    threads: int = 1
    """Threads of torch in each worker, whatever their number."""
    loader_workers: int = 0
    """Threads that decode and augment the images of the next steps; 0 = none but the training one."""

    def __post_init__(self) -> None:
        problems = [
            (self.epochs < 1, f"epochs={self.epochs} trains nothing; give at least 1"),
            (self.lr <= 0, f"lr={self.lr} trains nothing; give a positive rate"),
            (self.temperature <= 0, f"temperature={self.temperature} must be positive"),
            (self.backbone_lr < 0, f"backbone_lr={self.backbone_lr} is negative; 0 freezes the backbone"),
            (not 0 < self.set_aside < 1, f"set_aside={self.set_aside} is no share; give one between 0 and 1"),
            (not 0 <= self.share_beyond <= 1, f"share_beyond={self.share_beyond} is no share; give 0 to 1"),
            (self.margin <= 0, f"margin={self.margin} asks for nothing; give a positive one"),
            (self.remine_every < 0, f"remine_every={self.remine_every} is negative; 0 never mines again"),
            (not 0 <= self.teacher_share <= 1, f"teacher_share={self.teacher_share} is no share; give 0 to 1"),
            (self.teacher_temperature <= 0, f"teacher_temperature={self.teacher_temperature} must be positive"),
            (
                self.remine_every > 0 and self.mining != "lists",
                f"remine_every={self.remine_every} orders candidate lists anew; take --mining lists, or 0",
            ),
            (self.top_n < 2, f"top_n={self.top_n} re-ranks nothing; give at least 2"),
            (
                self.top_n > self.n_items,
                f"top_n={self.top_n} exceeds the {self.n_items} retrieved items per anchor; "
                "raise --n-items or lower --top-n",
            ),
            (
                self.mining == "batch" and self.loss == "listwise",
                "loss=listwise needs lists; take --mining lists, or --loss bce, ranknet or margin",
            ),
            (
                self.views > 1 and self.augmentation is None,
                f"views={self.views} without augmentation are equal; set views=1 or give an augmentation",
            ),
        ]
        counts = (
            "n_labels n_instances lists_per_step n_negatives n_items accumulation views score_pairs "
            "encode_block fit_images threads"
        )
        problems += [
            (getattr(self, name) < 1, f"{name}={getattr(self, name)} is too few; give at least 1")
            for name in counts.split()
        ]
        for is_wrong, message in problems:
            if is_wrong:
                raise BadInput(message)

    def is_frozen(self, epoch: int) -> bool:
        """Whether the backbone is frozen in this epoch (counted from 0)."""
        return self.backbone_lr == 0 or epoch < self.freeze_epochs

    def keeps_encodings(self, encoding_dtype: torch.dtype) -> bool:
        """Whether encodings are computed once: the backbone is frozen for good, and they are more than the
        pixels."""
        return self.backbone_lr == 0 and encoding_dtype != torch.uint8

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the weights, as plain values for a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "loader_workers"}


EXTRACTOR_DEFAULTS = TrainingConfig(
    epochs=30,
    mining="whole_batch",
    temperature=0.1,
    lr=1e-5,
    backbone_lr=1e-5,
    weight_decay=1e-4,
    warmup_steps=20,
    patience=5,
)
"""Fine-tuning of a pretrained extractor by its own distances; untrained networks want a higher backbone_lr."""


def defaults_for(pairwise_model: str) -> TrainingConfig:
    """Where training of a pairwise model (its name in `models.saving`) starts from; every value can be
    changed.

    token: projections and a small head on cached encodings, seconds. distance: a matrix on cached embeddings.
    concat and split: the backbone learns with the head, from images that are augmented anew in every step.
    """
    if pairwise_model == "token":
        return TrainingConfig()
    if pairwise_model == "distance":
        return TrainingConfig(lr=1e-3, weight_decay=0.0, patience=3)
    return TrainingConfig(
        epochs=30,
        steps_per_epoch=100,
        lists_per_step=4,
        n_negatives=5,
        lr=1e-3,
        backbone_lr=1e-4,
        freeze_epochs=1,
        weight_decay=1e-2,
        warmup_steps=50,
        patience=5,
        top_n=10,
        score_pairs=64,
    )
