"""Which network turns an image into an embedding, and what it sees of the image."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from distributed_rerank.errors import BadInput, check_numbers


def parse_named_values(words: Iterable[str]) -> dict[str, Any]:
    """`["pad_type=same", "depth=2"]` -> {"pad_type": "same", "depth": 2}. Raises BadInput for any other form."""
    parsed = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name.isidentifier():
            raise BadInput(f"extractor argument {word!r} must have the form NAME=VALUE, such as pad_type=same")
        parsed[name] = python_literal(value)
    return parsed


def python_literal(value: Any) -> Any:
    """A text as the Python literal that it spells, or as it is where it spells none; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Precision = Literal["auto", "fp32", "bf16"]
NamedValues = Annotated[
    Mapping[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=parse_named_values,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    ),
]
"""On the command line words of the form name=value."""


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """The extractor: a timm network and the transform of its images. A default of None is the network's own."""

    name: Annotated[str | None, arg(name="extractor")] = None
    """A timm model such as vit_small_patch16_224.dino, `hf-hub:owner/model`, `local-dir:folder`, or a function of your
    own as package.module:function that returns a torch module."""
    weights: Annotated[str | None, arg(name="extractor-weights")] = None
    """A .safetensors, .pth or .pt file; `none` for an untrained network. Default: timm's weights from the hub."""
    args: Annotated[NamedValues, arg(name="extractor-args")] = field(default_factory=dict)
    """Further arguments of timm.create_model, as name=value, e.g. pad_type=same."""
    image_size: int | tuple[int, int] | None = None
    """Side of the square image in pixels, or height and width."""
    resize: Literal["square", "crop"] = "square"
    """square: squash the whole image (as open-metric-learning does). crop: resize the shorter side, cut the centre."""
    crop_pct: float | None = None
    """Share of the shorter side that the centre crop keeps, above 0 to 1 (resize=crop)."""
    interpolation: Interpolation | None = None
    """How pixels are interpolated when an image is resized."""
    mean: tuple[float, float, float] | None = None
    """Mean of each colour channel, 0 to 1."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each colour channel, 0 to 1."""
    normalise: bool = True
    """Scale embeddings to length 1, so that the order by L2 distance is the order by cosine."""
    precision: Annotated[Precision, arg(name="extractor-precision")] = "auto"
    """Number format of the network. auto: bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    extractor_seed: int = 0
    """Seed of an untrained network's weights."""

    def __post_init__(self) -> None:
        check_numbers(self, "image_size", least=1)
        check_numbers(self, "crop_pct std", above=0)
        check_numbers(self, "mean")
        check_numbers(self, "extractor_seed", least=0)

    def without_effect(self) -> dict[str, str]:
        """Fields that these settings make meaningless, with the setting to change for them to count."""
        return {} if self.resize == "crop" else {"crop_pct": "--resize crop"}

    @property
    def network(self) -> str:
        """The name of the network. Raises BadInput where none is given."""
        if self.name is None:
            raise BadInput("no extractor is named; give --extractor, e.g. --extractor vit_small_patch16_224.dino")
        return self.name

    def check_files(self) -> None:
        """Raises BadInput where no network is named or its weights file does not exist."""
        if self.network and self.weights not in (None, "none") and not Path(self.weights).is_file():
            raise BadInput(f"--extractor-weights {self.weights} does not exist; give a file, or none")
