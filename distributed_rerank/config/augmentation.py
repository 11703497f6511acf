"""How training images are changed at random."""

from dataclasses import dataclass

from distributed_rerank.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of a training image: OML's `get_augs_torch` with a colour jitter that has an effect."""

    min_scale: float = 1.0
    """Smallest share of the area that a random crop keeps, above 0; 1 = no crop."""
    flip: float = 0.5
    """Probability of mirroring."""
    brightness: float = 0.3
    """Brightness is multiplied by a factor of 1 +- this."""
    contrast: float = 0.3
    """Contrast is multiplied by a factor of 1 +- this."""
    saturation: float = 0.3
    """Saturation is multiplied by a factor of 1 +- this."""
    hue: float = 0.05
    """The hue is turned by +- this, in full turns, up to 0.5."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise BadInput(f"min_scale={self.min_scale} is not in (0, 1]; 1 switches the random crop off")
        for name, top in (("flip", 1), ("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= top:
                raise BadInput(f"{name}={getattr(self, name)} is not in [0, {top}]; 0 switches it off")
