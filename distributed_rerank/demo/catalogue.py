"""The generated catalogue of `make demo`: look-alike products under hard photographic conditions.

Thirty families of four designs share shape, colours, pattern, name and layout, and differ in ONE local
detail: the emblem, the number of dots, the colour of a slim band, the corner of a seal, or the size code. A
first stage finds the family; telling its variants apart needs a look at the detail. That is the case
re-ranking exists for, on pictures that need no network and no licence.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from distributed_rerank.demo.camera import take_photo
from distributed_rerank.demo.drawing import BANDS, CORNERS, EMBLEMS, KINDS, PATTERNS, Design, draw_design
from distributed_rerank.errors import BadInput

VARIANTS = "abcd"
WORDS = (
    "LUMA",
    "ORTO",
    "KAVI",
    "MIRA",
    "SOLE",
    "NEVA",
    "TIDA",
    "PURO",
    "BONA",
    "ZEST",
    "FERN",
    "ALTO",
    "RIVA",
    "DUNE",
    "OLEA",
)
SIZE_CODES = ("S", "M", "L", "X")
DETAILS = {
    "emblem": EMBLEMS,
    "n_dots": (1, 2, 3, 4),
    "band": tuple(range(len(BANDS))),
    "corner": tuple(range(len(CORNERS))),
    "size_code": SIZE_CODES,
}


@dataclass(frozen=True)
class DesignFamily:
    """Four designs that differ in the field `detail` only, and the split that all of them belong to."""

    split: str
    detail: str
    designs: tuple[Design, ...]


def write_demo_catalogue(folder: Path, n_designs: int = 120, n_images: int = 6, size: int = 128, seed: int = 0) -> Path:
    """Write `n_designs` x `n_images` JPEG photos of `size` x `size` pixels and their table; returns its path.

    The table is `df.csv` with OML's columns: label, path (relative to the folder), split, is_query,
    is_gallery, category (the kind of product). No family is in both splits; validation images are query and
    gallery items. The bytes depend only on the arguments and the version of Pillow, and image i of a design
    does not depend on how many others are asked for. Raises BadInput where the numbers cannot give two
    splits with two images a label.
    """
    n_families = -(-n_designs // len(VARIANTS))
    if n_families < 2 or n_images < 2 or size < 48:
        raise BadInput(
            f"n_designs={n_designs}, n_images={n_images}, size={size} is too small for a demo catalogue; "
            f"give at least {len(VARIANTS) + 1} designs, 2 images and 48 pixels"
        )
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(n_designs):
        family_number, variant = divmod(number, len(VARIANTS))
        family = design_family(family_number, seed)
        design = family.designs[variant]
        label = f"{design.kind}-{family_number:02d}{VARIANTS[variant]}"
        flat = draw_design(design)
        for image in range(n_images):
            path = f"images/{label}-{image}.jpg"
            rng = np.random.default_rng([seed, 1, number, image])
            photo, quality = take_photo(flat, size, rng)
            photo.save(folder / path, quality=quality)
            rows.append(_row(label, path, family.split, design.kind))
    table = folder / "df.csv"
    pd.DataFrame(rows).to_csv(table, index=False, lineterminator="\n")
    return table


def _row(label: str, path: str, split: str, category: str) -> dict[str, object]:
    is_evaluated = split == "validation"
    return {
        "label": label,
        "path": path,
        "split": split,
        "is_query": is_evaluated,
        "is_gallery": is_evaluated,
        "category": category,
    }


def design_family(number: int, seed: int) -> DesignFamily:
    """Family `number`, which depends on no other: its split, and the detail in which its designs differ.

    Kinds and details alternate so that both splits see all of them; colours and layout are drawn at random.
    """
    rng = np.random.default_rng([seed, 0, number])
    turn, kind = divmod(number, len(KINDS))
    detail = list(DETAILS)[(turn + 2 * kind) % len(DETAILS)]
    hue = (0.618034 * number + float(rng.uniform(0.0, 0.05))) % 1.0
    base = Design(
        kind=KINDS[kind],
        hue=hue,
        accent_hue=(hue + float(rng.uniform(0.25, 0.75))) % 1.0,
        is_dark=bool(rng.random() < 0.4),
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
        word=WORDS[int(rng.integers(len(WORDS)))],
        is_upside_down=bool(rng.random() < 0.5),
        emblem=EMBLEMS[int(rng.integers(len(EMBLEMS)))],
        n_dots=int(rng.integers(1, 5)),
        band=int(rng.integers(len(BANDS))),
        corner=int(rng.integers(len(CORNERS))),
        size_code=SIZE_CODES[int(rng.integers(len(SIZE_CODES)))],
    )
    order = rng.permutation(len(DETAILS[detail]))[: len(VARIANTS)]
    values = [DETAILS[detail][int(position)] for position in order]
    split = "train" if (turn + kind) % 2 == 0 else "validation"
    return DesignFamily(split, detail, tuple(replace(base, **{detail: value}) for value in values))
