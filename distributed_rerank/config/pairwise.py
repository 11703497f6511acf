"""How a pairwise model is built: one class for each kind; the extractor's network is its backbone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_type_hints

from tyro.conf import OmitArgPrefixes

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.own import is_own, load_own
from distributed_rerank.errors import BadInput, check_numbers

PairwiseName = Literal["token", "concat", "split", "distance"]


@dataclass(frozen=True, kw_only=True)
class PairwiseConfig:
    """What all pairwise models have."""

    model_name: ClassVar[str] = ""
    """`package.module:Class` of the model, in the config of a model of your own."""

    extractor: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)
    head_seed: int = 0
    """Seed of the untrained head and projections."""

    def __post_init__(self) -> None:
        check_numbers(self, "head_seed", least=0)


@dataclass(frozen=True, kw_only=True)
class TokenSiameseConfig(PairwiseConfig):
    """Model `token`: an image's encoding is mostly depths x grid^2 x token_dim numbers."""

    depths: tuple[int, ...] = (-2, -1)
    """Feature maps that give tokens: stages of a CNN, blocks of a ViT; negative = counted from the end."""
    grid: int = 5
    """Each feature map is pooled to grid x grid tokens."""
    token_dim: int = 96
    """Numbers of a token after its projection."""
    pools: tuple[int, ...] = (1, 2, 3)
    """Each depth gives one global vector for each of these coarser grids."""
    global_dim: int = 200
    """Numbers of a global vector after its projection."""
    token_storage: Literal["float32", "float16", "int8"] = "float16"
    """Number format of cached encodings."""
    shrinkage: float = 0.05
    """How far the covariance within labels is shrunk towards a multiple of the identity, 0 to 1."""
    hidden_dim: int = 64
    """Width of the head's hidden layer."""
    head_dropout: float = 0.1
    """Share of the hidden layer that training drops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.depths and self.pools):
            raise BadInput(f"depths={self.depths}, pools={self.pools} give no token; name one of each or more")
        check_numbers(self, "grid token_dim pools global_dim hidden_dim", least=1)
        check_numbers(self, "shrinkage head_dropout", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class ConcatSiameseConfig(PairwiseConfig):
    """Model `concat`: `image_size` is that of one image, the network sees twice the height."""

    hidden_dims: tuple[int, ...] = (100,)
    """Widths of the head's hidden layers."""
    dropout: float = 0.5
    """Share of each hidden layer that training drops."""
    both_orders: bool = False
    """Score both orders of a pair and average the probabilities, at twice the cost (OML's use_tta)."""
    pairwise_weights: str | None = None
    """State dict of a ConcatSiamese (ours or OML's) to start from; the extractor's weights are then not needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "hidden_dims", least=1)
        check_numbers(self, "dropout", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class SplitSiameseConfig(ConcatSiameseConfig):
    """Model `split`: a ConcatSiamese on a plain ViT whose first blocks run once per image."""

    split_at: int = 8
    """Blocks that run per image; the others see both images."""
    storage: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Number format of the cached tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "split_at", least=0)


@dataclass(frozen=True, kw_only=True)
class DistanceSiameseConfig(PairwiseConfig):
    """Model `distance`: the L2 distance of two embeddings, as they are or after a learned matrix."""

    linear: bool = True
    """Multiply embeddings by a learned square matrix before the distance."""
    identity_init: bool = True
    """Start from the identity matrix; else from a random one."""
    output_bias: float = 0.0
    """Added to the distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "output_bias")


PAIRWISE_CONFIGS: Mapping[str, type[PairwiseConfig]] = {
    "token": TokenSiameseConfig,
    "concat": ConcatSiameseConfig,
    "split": SplitSiameseConfig,
    "distance": DistanceSiameseConfig,
}
"""By the name on the command line and in config.json."""


def pairwise_name(config: PairwiseConfig) -> str:
    """The name of the pairwise model that `config` builds."""
    for name, kind in PAIRWISE_CONFIGS.items():
        if type(config) is kind:
            return name
    if is_own(config.model_name):
        return config.model_name
    raise BadInput(
        f"{type(config).__name__} is no config of a pairwise model; known are {', '.join(PAIRWISE_CONFIGS)}; one "
        'of your own says model_name: ClassVar[str] = "package.module:Class"'
    )


def pairwise_config(name: str) -> type[PairwiseConfig]:
    """The config class of a pairwise model: of one of ours, or of your own, by the annotation of its `config`.

    Raises BadInput for a name that is neither, and for a class without such an annotation.
    """
    if name in PAIRWISE_CONFIGS:
        return PAIRWISE_CONFIGS[name]
    if not is_own(name):
        raise BadInput(
            f"pairwise_model={name!r} is unknown; known are {', '.join(map(repr, PAIRWISE_CONFIGS))}, or your own "
            "as package.module:Class"
        )
    kind = get_type_hints(load_own(name)).get("config")
    if not (isinstance(kind, type) and issubclass(kind, PairwiseConfig) and kind.model_name == name):
        raise BadInput(
            f"{name} does not say which config it has; write `config: YourConfig` in it, and in that subclass of "
            f'PairwiseConfig `model_name: ClassVar[str] = "{name}"`'
        )
    return kind
