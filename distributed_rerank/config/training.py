"""How a model is trained. All of it decides the weights, so all of it goes into the model folder's fingerprint."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from distributed_rerank.config.augmentation import Augmentation
from distributed_rerank.config.own import load_function
from distributed_rerank.errors import BadInput, check_numbers


@dataclass(frozen=True)
class NegativeFilters:
    """Which candidates of other labels may serve as negatives; applied in the order of the fields."""

    absolute_margin: float | None = None
    """Drop those whose similarity (cosine) plus this exceeds that of the least similar positive of the anchor."""
    relative_margin: float | None = None
    """Drop those more similar than the least similar positive of the anchor less this share of its similarity."""
    min_distance: float | None = None
    """Drop those nearer than this L2 distance; sentence-transformers' `max_score` s is sqrt(2 - 2 s) here."""
    range_min: int = 0
    """Drop this many of the nearest that are left."""
    range_max: int | None = None
    """Drop all after this many of the nearest that are left, counted before `range_min` drops any."""

    def __post_init__(self) -> None:
        check_numbers(self, "absolute_margin relative_margin min_distance")
        if self.range_min < 0 or (self.range_max is not None and self.range_max <= self.range_min):
            raise BadInput(
                f"range_min={self.range_min}, range_max={self.range_max} leave no negatives; "
                "use 0 <= range_min < range_max"
            )


LossName = Literal["bce", "listwise", "ranknet", "margin"]
Target = Literal["both", "map@10", "cmc@1", "mrr"]


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
    loss: LossName | str = "listwise"
    """bce: each pair by itself (OML); listwise: softmax over a list; ranknet, margin: each positive against each
    negative, softly or until it is `margin` nearer; package.module:function: a loss of lists of your own."""
    margin: float = 1.0
    """Of loss=margin, in logits divided by `temperature`."""
    temperature: float = 1.0
    """Logits are divided by it in the loss; distances of length-one embeddings need about 0.1 to tell a list apart."""
    mining: Literal["lists", "batch", "whole_batch"] = "lists"
    """lists: pairs from the anchors' own candidate lists; batch: OML's balanced batches with hard pairs;
    whole_batch: every image of a balanced batch against all others, for embeddings, whose pairs cost nothing."""
    n_labels: int = 30
    """Labels in a balanced batch, or all where there are fewer (mining=batch, whole_batch)."""
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
    """How gradients become steps."""
    momentum: float = 0.9
    """Share of the last step that the next one keeps, 0 to below 1 (optimizer=sgd)."""
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
    target: Target = "both"
    """What the choice of the chain maximises; both: mAP@10 + 2 CMC@1. mAP@10 may not fall for it, nor CMC@1 below the
    first stage's."""
    accept: float = 0.995
    """How probable the gain of a chain step must be, on labels that it has not seen, for the step to be taken. Steps
    that are only likely may be taken as one: their gain together must be surer still, by half the doubt."""
    adapt: bool = True
    """Try a map of the embeddings, fitted to the labels in closed form, as first chain step (mining=lists)."""
    teacher_share: float = 0.5
    """Weight of agreeing with the teacher, where there is one; the rest is the labels' loss."""
    teacher_temperature: float = 1.0
    """Teacher's and student's logits are divided by it before they are compared; larger = softer."""
    patience: int = 0
    """Epochs without a better validation figure after which training ends, the best weights being kept; 0 =
    it runs to its end and the last weights are kept."""
    set_aside: float | None = 0.25
    """Share of the train labels that a model without projections to fit is never trained on: early stopping
    and chain are chosen on them. Models with projections are trained on either half of the labels and judged
    on the other. Where lists are mined, labels that the first stage takes for one another, such as the variants
    of a product, stay on one side. None: a quarter, but 16 labels where that is no more than 40 %, for few
    labels show little."""
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
    loader_workers: int | None = None
    """Threads that decode and augment the images of the next steps; 0 = none but the training one. Default: 0, or 16
    beside a GPU."""

    def __post_init__(self) -> None:
        self._check_numbers()
        problems = [
            (self.epochs < 1, f"epochs={self.epochs} trains nothing; give at least 1"),
            (self.lr <= 0, f"lr={self.lr} trains nothing; give a positive rate"),
            (self.temperature <= 0, f"temperature={self.temperature} must be positive"),
            (not 0 <= self.momentum < 1, f"momentum={self.momentum} must be from 0 to below 1"),
            (self.backbone_lr < 0, f"backbone_lr={self.backbone_lr} is negative; 0 freezes the backbone"),
            (
                self.set_aside is not None and not 0 < self.set_aside < 1,
                f"set_aside={self.set_aside} is no share; give one between 0 and 1",
            ),
            (not 0 <= self.share_beyond <= 1, f"share_beyond={self.share_beyond} is no share; give 0 to 1"),
            (self.margin <= 0, f"margin={self.margin} asks for nothing; give a positive one"),
            (self.remine_every < 0, f"remine_every={self.remine_every} is negative; 0 never mines again"),
            (not 0 <= self.teacher_share <= 1, f"teacher_share={self.teacher_share} is no share; give 0 to 1"),
            (self.teacher_temperature <= 0, f"teacher_temperature={self.teacher_temperature} must be positive"),
            (
                self.remine_every > 0 and self.mining != "lists",
                f"remine_every={self.remine_every} orders candidate lists anew; take --mining lists, or 0",
            ),
            (not 0.5 <= self.accept < 1, f"accept={self.accept} is no such probability; give 0.5 to below 1"),
            (self.top_n < 2, f"top_n={self.top_n} re-ranks nothing; give at least 2"),
            (
                self.top_n > self.n_items,
                f"top_n={self.top_n} exceeds the {self.n_items} retrieved items per anchor; "
                "raise --n-items or lower --top-n",
            ),
            (
                self.mining == "batch" and self.loss not in ("bce", "ranknet", "margin"),
                f"loss={self.loss} needs lists; take --mining lists, or --loss bce, ranknet or margin",
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
        if self.loss not in get_args(LossName):
            load_function(self.loss, "--loss", get_args(LossName))

    def _check_numbers(self) -> None:
        check_numbers(self, "seed freeze_epochs warmup_steps patience loader_workers weight_decay clip_norm", least=0)
        check_numbers(self, "steps_per_epoch", least=1)
        check_numbers(self, "minutes negative_temperature", above=0)
        check_numbers(self, "margin temperature teacher_temperature lr backbone_lr")  # above 0 is checked with a reason

    def is_frozen(self, epoch: int) -> bool:
        """Whether the backbone is frozen in this epoch (counted from 0)."""
        return self.backbone_lr == 0 or epoch < self.freeze_epochs

    def without_effect(self) -> dict[str, str]:
        """Fields that these settings make meaningless, with the setting to change for them to count."""
        is_frozen = self.backbone_lr == 0
        rules = {
            "--mining batch or whole_batch": (self.mining == "lists", "n_labels n_instances"),
            "--mining lists": (
                self.mining != "lists",
                "lists_per_step n_negatives steps_per_epoch negative_temperature remine_every share_beyond filters "
                "adapt",
            ),
            "--loss margin": (self.loss != "margin", "margin"),
            "--optimizer sgd": (self.optimizer != "sgd", "momentum"),
            "a positive --backbone-lr": (is_frozen, "freeze_epochs gradient_checkpointing"),
            "--backbone-lr 0": (not is_frozen, "views"),
        }
        return {name: fix for fix, (has_none, names) in rules.items() if has_none for name in names.split()}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the weights, as plain values for a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "loader_workers"}

    def loader_threads(self, is_gpu: bool) -> int:
        """`loader_workers`, its default written out."""
        return (16 if is_gpu else 0) if self.loader_workers is None else self.loader_workers


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """Which labels may show what re-ranking is worth: those that the extractor has not seen."""

    extractor_trained_on: Literal["unknown", "none", "train"] = "unknown"
    """Labels that the extractor has been trained on: none of the table's, or those of split train. unknown: its weights
    file tells where `train-extractor` wrote it, else the embeddings are looked at."""
    calibration_split: str | None = None
    """Split whose labels the extractor has not seen: mining, training and choice of the chain use its rows only.
    Default: `calibration`, where the table has such rows, unless --extractor-trained-on none."""

    def __post_init__(self) -> None:
        if self.calibration_split == "validation":
            raise BadInput("--calibration-split validation: what is reported may not be trained on; name another split")


EXTRACTOR_DEFAULTS = TrainingConfig(
    epochs=30,
    mining="whole_batch",
    temperature=0.1,
    lr=2e-4,
    backbone_lr=2e-4,
    weight_decay=1e-4,
    warmup_steps=20,
    patience=5,
    set_aside=None,
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
