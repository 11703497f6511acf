"""Data sets of the literature, from their extracted archives, by the rules of their published protocols.

| layout | training | measured on | rule |
|---|---|---|---|
| sop | 59,551 photos, 11,318 labels | 60,502 photos, 11,316 labels | each photo against all others (Song et al. 2016) |
| inshop | 25,882 photos, 3,997 labels | 14,218 queries, 12,612 gallery, 3,985 labels | two lists (Liu et al. 2016) |
| cub | 5,864 photos, classes 1 to 100 | 5,924 photos, classes 101 to 200 | each against all others, whole photos |
| cars | 8,054 photos, classes 1 to 98 | 8,131 photos, classes 99 to 196 | each against all others, whole photos |
| market1501 | 12,936 photos, 751 labels | 3,368 queries of 750 labels, 15,913 gallery | no answer of the same camera |
"""

import re
from collections.abc import Mapping
from pathlib import Path

from distributed_rerank.errors import BadInput
from distributed_rerank.importing.rows import Row, images_below, needed

COUNTS: Mapping[str, Mapping[str, int]] = {
    "sop": {"train": 59_551, "train labels": 11_318, "queries": 60_502, "gallery": 60_502, "validation labels": 11_316},
    "inshop": {
        "train": 25_882,
        "train labels": 3_997,
        "queries": 14_218,
        "gallery": 12_612,
        "validation labels": 3_985,
    },
    "cub": {"train": 5_864, "train labels": 100, "queries": 5_924, "gallery": 5_924, "validation labels": 100},
    "cars": {"train": 8_054, "train labels": 98, "queries": 8_131, "gallery": 8_131, "validation labels": 98},
    "market1501": {"train": 12_936, "train labels": 751, "queries": 3_368, "gallery": 15_913, "validation labels": 751},
    "roxford": {"queries": 70, "gallery": 4_993},
    "rparis": {"queries": 70, "gallery": 6_322},
}
"""Of the published protocol. Market-1501's validation labels are 750 persons and 0000, the distractors."""
_MARKET = re.compile(r"(-1|\d{4})_c(\d)s(\d)_")


def read_sop(folder: Path) -> list[Row]:
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt."""
    rows = []
    for split, name in (("train", "Ebay_train.txt"), ("validation", "Ebay_test.txt")):
        file = needed(folder, "Stanford Online Products", name, f"*/{name}")
        for line in file.read_text().splitlines()[1:]:
            _, label, _, path = line.split()
            category = path.partition("/")[0].removesuffix("_final")
            rows.append(Row(file.parent / path, label, split, category=category))
    return rows


def read_inshop(folder: Path) -> list[Row]:
    """DeepFashion In-shop: list_eval_partition.txt says what is training, query and gallery."""
    name = "list_eval_partition.txt"
    file = needed(folder, "In-shop", name, f"*/{name}", f"*/*/{name}")
    home = next((place for place in (file.parent, *file.parents[1:3]) if _has_images(place)), file.parent)
    rows = []
    for line in file.read_text().splitlines()[2:]:
        path, label, status = line.split()
        if status not in ("train", "query", "gallery"):
            raise BadInput(f"{file}: the status {status!r} of {path} is unknown; known are train, query, gallery")
        category = path.split("/")[2] if path.count("/") > 2 else None
        split = "train" if status == "train" else "validation"
        rows.append(Row(home / path, label, split, status == "query", status == "gallery", category))
    return rows


def _has_images(folder: Path) -> bool:
    return (folder / "img").is_dir()


def read_cub(folder: Path) -> list[Row]:
    """CUB-200-2011: the first hundred classes train, the others are measured on; whole photos, no boxes."""
    file = needed(folder, "CUB-200-2011", "images.txt", "*/images.txt")
    paths = dict(line.split() for line in file.read_text().splitlines())
    labels = dict(line.split() for line in (file.parent / "image_class_labels.txt").read_text().splitlines())
    return _halves([(file.parent / "images" / path, int(labels[key])) for key, path in paths.items()], 100)


def read_cars(folder: Path) -> list[Row]:
    """Cars-196: cars_annos.mat; the first 98 classes train, the others are measured on; whole photos, no boxes."""
    file = needed(folder, "Cars-196", "cars_annos.mat", "*/cars_annos.mat")
    try:
        from scipy.io import loadmat  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput("cars_annos.mat is a file of MATLAB; pip install scipy to read it") from error
    found = loadmat(file, squeeze_me=True)["annotations"].reshape(-1)
    return _halves([(file.parent / str(one["relative_im_path"]), int(one["class"])) for one in found], 98)


def _halves(photos: list[tuple[Path, int]], n_train: int) -> list[Row]:
    """Classes up to `n_train` train; of the others each photo is a query among all others."""
    return [Row(path, str(label), "train" if label <= n_train else "validation") for path, label in photos]


def read_market1501(folder: Path) -> list[Row]:
    """Market-1501: a query's answers of its own camera do not count; 0000 distracts, -1 is left out."""
    home = needed(folder, "Market-1501", "bounding_box_train/*.jpg", "*/bounding_box_train/*.jpg").parents[1]
    rows = []
    parts = (("bounding_box_train", "train"), ("query", "validation"), ("bounding_box_test", "validation"))
    for part, split in parts:
        for path in images_below(home / part):
            found = _MARKET.match(path.name)
            if found is None:
                raise BadInput(f"{path} is not named as Market-1501's photos are (0002_c1s1_000451_03.jpg); remove it")
            person, camera, _ = found.groups()
            if person == "-1":
                continue
            # Photos of one sequence never answer each other: here the person and the camera.
            rows.append(
                Row(path, person, split, part == "query", part != "query", sequence=f"{person} camera {camera}")
            )
    return rows
