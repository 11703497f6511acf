"""A folder to a catalogue: its layout is found, its rows are read, checked and divided, and the table is written."""

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from PIL import Image

from distributed_rerank.config.importing import ImportConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import Purpose, read_catalogue
from distributed_rerank.data.image_warnings import warnings_of
from distributed_rerank.data.images import DAMAGE, FORMATS
from distributed_rerank.data.judgement_files import read_judgements
from distributed_rerank.data.judgements import COLUMNS
from distributed_rerank.errors import BadInput
from distributed_rerank.importing import annotations, protocols
from distributed_rerank.importing.judged import read_mieb, read_revisited
from distributed_rerank.importing.rows import Judged, Row, first_file
from distributed_rerank.storage.files import atomic_path

logger = logging.getLogger(__name__)

READERS: Mapping[str, Callable[[Path, str | None], list[Row]]] = {
    "folders": annotations.read_folders,
    "oml": annotations.read_oml,
    "imagefolder": annotations.read_imagefolder,
    "coco": annotations.read_coco,
    "cvat": annotations.read_cvat,
    "fiftyone": annotations.read_fiftyone,
    "sop": lambda folder, _: protocols.read_sop(folder),
    "inshop": lambda folder, _: protocols.read_inshop(folder),
    "cub": lambda folder, _: protocols.read_cub(folder),
    "cars": lambda folder, _: protocols.read_cars(folder),
    "market1501": lambda folder, _: protocols.read_market1501(folder),
}
JUDGED_READERS: Mapping[str, Callable[[Path, Path], Judged]] = {
    "roxford": partial(read_revisited, name="roxford5k"),
    "rparis": partial(read_revisited, name="rparis6k"),
    "mieb": read_mieb,
}
_SIGNS: Mapping[str, tuple[str, ...]] = {
    "sop": ("Ebay_train.txt", "*/Ebay_train.txt"),
    "inshop": ("list_eval_partition.txt", "*/list_eval_partition.txt", "*/*/list_eval_partition.txt"),
    "cub": ("image_class_labels.txt", "*/image_class_labels.txt"),
    "cars": ("cars_annos.mat", "*/cars_annos.mat"),
    "market1501": ("bounding_box_train/*.jpg", "*/bounding_box_train/*.jpg"),
    "roxford": ("gnd_roxford5k.pkl", "*/gnd_roxford5k.pkl", "*/*/gnd_roxford5k.pkl"),
    "rparis": ("gnd_rparis6k.pkl", "*/gnd_rparis6k.pkl", "*/*/gnd_rparis6k.pkl"),
    "mieb": ("qrels/*.parquet",),
    "oml": ("df.csv",),
    "imagefolder": annotations.METADATA,
    "cvat": ("annotations.xml",),
    "fiftyone": ("samples.json",),
}
"""Files that tell what a folder is, the surest first."""


@dataclass(frozen=True)
class Imported:
    """What came of a folder."""

    catalogue: Catalogue
    layout: str
    has_own_split: bool
    unreadable: Sequence[str]
    """Photos that were left out, with the reason."""
    judgements: Sequence[Path] = ()
    """Files that say what answers each query, where labels do not."""

    def counts(self) -> dict[str, int]:
        """Photos and labels of both splits, by the names of `protocols.COUNTS`."""
        table = self.catalogue.table
        split, labels = table["split"].to_numpy(dtype=object), table["label"].to_numpy(dtype=object)
        return {
            "train": int((split == "train").sum()),
            "train labels": len(set(labels[split == "train"])),
            "queries": len(self.catalogue.query_items),
            "gallery": self.catalogue.n_gallery,
            "validation labels": len(set(labels[split == "validation"])),
        }


def import_folder(folder: Path, out: Path, config: ImportConfig, *, overwrite: bool = False) -> Imported:
    """Read the folder, write the table `out` (.csv or .parquet) and check it as training and evaluation do.

    Photos that are no images are left out and named. Labels without a second photo cannot be found and are no queries:
    they are gallery items of `validation`. Raises BadInput where nothing is left to train or to measure, and where
    `out` is there with other rows, unless `overwrite` is given.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise BadInput(f"--out {out} must end in .csv or .parquet")
    layout = find_layout(folder) if config.layout == "auto" else config.layout
    judged = JUDGED_READERS[layout](folder, out.with_name(f"{out.stem}_images")) if layout in JUDGED_READERS else None
    rows = READERS[layout](folder, config.label_field) if judged is None else judged.rows
    rows, unreadable = _without_unreadable(_once_each(rows))
    if not rows:
        raise BadInput(f"{folder} ({layout}) has no readable photo with a label; first: {(unreadable or ['none'])[0]}")
    has_own_split = any(row.split for row in rows)
    rows = rows if has_own_split else divide(rows, config.validation_share, config.split_seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        table = _table(rows, out.parent)
        table.to_csv(temporary, index=False) if out.suffix == ".csv" else table.to_parquet(temporary, index=False)
        if out.is_file() and not overwrite and out.read_bytes() != temporary.read_bytes():
            raise BadInput(f"--out {out} is there with other rows; choose another file, or give --overwrite")
    purposes: tuple[Purpose, ...] = ("training", "evaluation") if judged is None else ("evaluation",)
    catalogue = [read_catalogue(str(out), purpose=purpose) for purpose in purposes][-1]
    files = [] if judged is None else list(_write_judgements(judged, catalogue, out))
    return Imported(catalogue, layout, has_own_split, unreadable, files)


def _write_judgements(judged: Judged, catalogue: Catalogue, out: Path) -> Iterator[Path]:
    """A table for each protocol beside `out`, of the photos that the catalogue has, and check it as evaluation does."""
    for name, grades in judged.grades.items():
        file = out.with_name(f"{out.stem}.{name}.csv")
        table = pd.DataFrame(grades, columns=list(COLUMNS))
        is_there = table[list(COLUMNS[:2])].isin(catalogue.ids.tolist()).all(axis=1)
        with atomic_path(file) as temporary:
            table[is_there].to_csv(temporary, index=False)
        read_judgements(str(file), *catalogue.roles())
        yield file


def find_layout(folder: Path) -> str:
    """The layout that the folder's files tell; folders, if none does."""
    for layout, patterns in _SIGNS.items():
        if first_file(folder, *patterns) is not None:
            return layout
    if first_file(folder, "labels.json") is not None and (folder / "data").is_dir():
        return "coco" if annotations.looks_like_coco(folder) else "fiftyone"
    return "coco" if annotations.looks_like_coco(folder) else "folders"


def divide(rows: Sequence[Row], validation_share: float, seed: int) -> list[Row]:
    """The rows with a split in which no label is in both parts; a photo's boxes of two labels may be.

    Raises BadInput where fewer than two labels of two photos would be left in a part.
    """
    counts = Counter(row.label for row in rows)
    labels = sorted(label for label, count in counts.items() if count > 1)
    n_validation = round(len(labels) * validation_share)
    if min(n_validation, len(labels) - n_validation) < 2:
        raise BadInput(
            f"{len(labels)} labels with two photos or more, of {len(counts)}: too few to train on some and to measure "
            "on others; at least two are needed in each part"
        )
    random.Random(seed).shuffle(labels)
    measured = set(labels[:n_validation])
    trained = set(labels[n_validation:])
    return [
        replace(row, split="train" if row.label in trained else "validation", is_query=row.label in trained | measured)
        for row in rows
    ]


def _once_each(rows: Sequence[Row]) -> list[Row]:
    """The rows without repeats: links to one photo, or a box twice. Raises BadInput where their labels differ."""
    first: dict[Any, Row] = {}
    for row in rows:
        met = first.setdefault(row.id if row.id is not None else (row.path.resolve(), row.box), row)
        if met.label != row.label and row.id is None:
            box = f", box {row.box}," if row.box else ""
            raise BadInput(
                f"{met.path} and {row.path}{box} are one photo with two labels, {met.label!r} and {row.label!r}; "
                "remove one of them"
            )
    if len(first) < len(rows):
        logger.warning("left out: %d rows of photos, or boxes in them, that are there already", len(rows) - len(first))
    return list(first.values())


def _without_unreadable(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows whose photos can be opened (headers only), and the others with the reason, each photo once."""
    paths = sorted({row.path for row in rows})
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        reasons = {path: reason for path, reason in zip(paths, pool.map(_reason, paths), strict=True) if reason}
    return [row for row in rows if row.path not in reasons], [f"{path}: {reason}" for path, reason in reasons.items()]


def _reason(path: Path) -> str | None:
    """Why a file is no photo; None = its header is good. A pipe is not waited for."""
    if path.exists() and not path.is_file():
        return "no regular file"
    try:
        with warnings_of(str(path)), Image.open(path, formats=FORMATS):
            return None
    except FileNotFoundError:
        return "file not found"
    except (*DAMAGE, Image.DecompressionBombError) as error:
        return " ".join(str(error).split())[:100] or type(error).__name__


def _table(rows: Sequence[Row], folder: Path) -> pd.DataFrame:
    """The table with paths relative to its folder where the photos lie below it, else absolute."""
    home = folder.resolve()
    paths = [row.path.resolve() for row in rows]
    table = pd.DataFrame(
        {
            "label": [row.label for row in rows],
            "path": [str(path.relative_to(home)) if path.is_relative_to(home) else str(path) for path in paths],
            "split": [row.split for row in rows],
            "is_query": [row.split == "validation" and row.is_query for row in rows],
            "is_gallery": [row.split == "validation" and row.is_gallery for row in rows],
        }
    )
    if any(row.id is not None for row in rows):
        table["id"] = [row.id for row in rows]
    for name in ("category", "sequence"):
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            table[name] = values
    if any(row.box is not None for row in rows):
        corners = [row.box or (None,) * 4 for row in rows]
        for side, name in enumerate(("x_1", "y_1", "x_2", "y_2")):
            table[name] = [corner[side] for corner in corners]
    return table


def log_summary(imported: Imported, folder: Path, out: Path) -> None:
    """What came of the folder, in a few lines, and the next command."""
    counts, labels = imported.counts(), imported.catalogue.table["label"].tolist()
    per_label = sorted(Counter(labels).values())
    logger.info("%s is read as %s: %d photos of %d labels", folder, imported.layout, len(labels), len(per_label))
    logger.info(
        "photos of a label: %d to %d, median %g; %d labels have one photo and are only found, not asked for",
        per_label[0], per_label[-1], median(per_label), per_label.count(1),
    )  # fmt: skip
    logger.info(
        "train: %d photos of %d labels; validation: %d queries, %d gallery items, %d labels (%s)",
        *counts.values(), "the protocol's own split" if imported.has_own_split else "no label is in both",
    )  # fmt: skip
    published = protocols.COUNTS.get(imported.layout)
    named = ", ".join(
        f"{name} {counts[name]} instead of {n}" for name, n in (published or {}).items() if counts[name] != n
    )
    if named:
        logger.warning("the published protocol has other counts: %s; is the archive complete?", named)
    for reason in imported.unreadable[:3]:
        logger.warning("left out: %s", reason)
    if len(imported.unreadable) > 3:
        logger.warning("and %d more photos that cannot be read", len(imported.unreadable) - 3)
    if imported.judgements:
        logger.info(
            "%s and %s are written; next: distributed-rerank evaluate --catalogue %s --judgements %s --extractor "
            "mobilenetv2_100 --out runs/evaluation, with the --model of another catalogue", out,
            ", ".join(file.name for file in imported.judgements), out, imported.judgements[-1],
        )  # fmt: skip
        return
    logger.info(
        "%s is written; next: distributed-rerank train --catalogue %s --extractor mobilenetv2_100 --out runs/model, "
        "then evaluate with the same --catalogue and --extractor, --model runs/model and another --out", out, out,
    )  # fmt: skip
