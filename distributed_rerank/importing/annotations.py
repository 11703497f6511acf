"""Annotated folders: one folder a label, Hugging Face's imagefolder, COCO, CVAT, FiftyOne, and OML's own table."""

import csv
import json
import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distributed_rerank.errors import BadInput
from distributed_rerank.importing.rows import SUFFIXES, Row, first_file, images_below, needed, others_below

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "images", "data"})
"""First folders that are no labels."""
METADATA = ("**/metadata.csv", "**/metadata.jsonl")
COCO = ("annotations.json", "_annotations.coco.json", "annotations/*.json", "*/_annotations.coco.json", "*.json")
FIFTYONE = ("samples.json", "labels.json")


def read_folders(folder: Path, field: str | None) -> list[Row]:
    """`label/photo.jpg` at any depth below folders such as train and test; what lies deeper than its label is its own.

    The label is the path below those folders, so that `shoes/red` and `bags/red` stay two; the first part of a longer
    one is the category.
    """
    rows, beside = [], []
    for path in images_below(folder):
        parts = list(path.relative_to(folder).parts[:-1])
        while parts and parts[0].lower() in SPLIT_FOLDERS:
            del parts[0]
        if parts:
            rows.append(Row(path, "/".join(parts), category=parts[0] if len(parts) > 1 else None))
        else:
            beside.append(path)
    if rows and beside:
        logger.warning("left out: %d photos that lie in no folder of a label, first %s", len(beside), beside[0])
    others = ", ".join(f"{number} {kind}" for kind, number in others_below(folder).most_common(5))
    if not rows:
        raise BadInput(
            f"{folder} has no folders with photos in it{others and f' ({others})'}; put the photos of each thing in a "
            f"folder of its own, named {' '.join(sorted(SUFFIXES))}"
        )
    if others:
        logger.warning("left out by their names: %s; photos are called %s", others, " ".join(sorted(SUFFIXES)))
    return rows


def read_imagefolder(folder: Path, field: str | None) -> list[Row]:
    """Hugging Face's metadata.csv or metadata.jsonl: `file_name` beside the label in `label` or another column."""
    needed(folder, "an imagefolder", *METADATA)
    rows = []
    for file in sorted(path for pattern in METADATA for path in folder.glob(pattern)):
        for entry in _entries(file):
            name = entry.get("file_name")
            if not name:
                raise BadInput(f"{file}: a row has no file_name; it names the photo, relative to this file")
            label = _chosen(entry, field, ("label", "labels", "class", "category", "item_id", "product_id"), file)
            rows.append(Row(file.parent / str(name), str(label)))
    return rows


def read_coco(folder: Path, field: str | None) -> list[Row]:
    """COCO's boxes; the label is an annotation's attribute `field`, else the category's name."""
    rows = []
    for file in _coco_files(folder):
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
        images = {one["id"]: one["file_name"] for one in content["images"]}
        paths = {key: _found(folder, file, str(name)) for key, name in images.items()}
        for one in content["annotations"]:
            category = names.get(one.get("category_id"))
            label = category
            if field is not None:
                label = one.get(field, one.get("attributes", {}).get(field))
            if label is None:
                raise BadInput(f"{file}: annotation {one.get('id')} has no {field or 'category'}; name --label-field")
            box = None
            if one.get("bbox"):
                left, top, width, height = map(float, one["bbox"])
                box = (left, top, left + width, top + height)
            rows.append(Row(paths[one["image_id"]], str(label), category=category if field else None, box=box))
    return rows


def read_cvat(folder: Path, field: str | None) -> list[Row]:
    """CVAT for images 1.1: boxes or tags in annotations.xml; the label is the attribute `field`, else the label."""
    file = needed(folder, "an export of CVAT", "annotations.xml", "*.xml")
    root = ElementTree.parse(file).getroot()
    rows = []
    for image in root.iter("image"):
        path = _found(folder, file, str(image.get("name")))
        for mark in [*image.iter("box"), *image.iter("tag")]:
            attributes = {one.get("name"): one.text for one in mark.iter("attribute")}
            label = mark.get("label") if field is None else attributes.get(field)
            if not label:
                raise BadInput(f"{file}: a mark of {image.get('name')} has no {field or 'label'}; name --label-field")
            sides = [mark.get(side) for side in ("xtl", "ytl", "xbr", "ybr")]
            box = (float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])) if all(sides) else None  # pyright: ignore
            rows.append(Row(path, label, category=mark.get("label") if field else None, box=box))
    return rows


def read_fiftyone(folder: Path, field: str | None) -> list[Row]:
    """FiftyOne's exports: FiftyOneDataset (samples.json) and FiftyOneImageClassificationDataset (labels.json)."""
    file = needed(folder, "an export of FiftyOne", *FIFTYONE)
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "labels.json":
        return list(_classified(folder, file, content))
    rows = []
    for sample in content["samples"]:
        path = _found(folder, file, str(sample["filepath"]))
        label = _chosen(sample, field, ("ground_truth", "label", "item_id", "product_id"), file)
        size = sample.get("metadata") or {}
        for one in label.get("detections", [label]) if isinstance(label, Mapping) else [{"label": label}]:
            rows.append(Row(path, str(one["label"]), box=_box_in_pixels(one, size, file)))
    return rows


def read_oml(folder: Path, field: str | None) -> list[Row]:
    """open-metric-learning's df.csv, with its own split; its relative paths start at the table."""
    file = needed(folder, "a data set of OML", "df.csv", "*.csv")
    rows = []
    for entry in _entries(file):
        corners = [entry.get(side) for side in ("x_1", "y_1", "x_2", "y_2")]
        box = tuple(float(side) for side in corners) if all(corners) else None  # pyright: ignore[reportArgumentType]
        split = str(entry["split"])
        flags = [str(entry.get(name)).lower() in ("true", "1", "1.0") for name in ("is_query", "is_gallery")]
        rows.append(
            Row(
                file.parent / str(entry["path"]), str(entry["label"]), split, flags[0], flags[1],
                entry.get("category") or None, entry.get("sequence") or None, box,  # pyright: ignore[reportArgumentType]
            )
        )  # fmt: skip
    return rows


def looks_like_coco(folder: Path) -> bool:
    """Whether a JSON file of the folder has COCO's two lists."""
    return bool(_coco_files(folder))


def _coco_files(folder: Path) -> list[Path]:
    """All of the first pattern that has any."""
    for pattern in COCO:
        found = []
        for path in sorted(folder.glob(pattern)):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
                found.append(path)
        if found:
            return found
    return []


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file or the lines of a JSONL file."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise BadInput(f"{file}: line {number} is no JSON ({error}); write it anew") from error


def _chosen(entry: Mapping[str, Any], field: str | None, usual: tuple[str, ...], file: Path) -> Any:
    """The label of an entry: in the field named, else in the first of the usual ones that it has."""
    for name in usual if field is None else (field,):
        if entry.get(name) not in (None, ""):
            return entry[name]
    known = ", ".join(name for name in entry if name not in ("file_name", "filepath", "_id"))
    raise BadInput(f"{file}: no label in {field or ' or '.join(usual)}; name its field with --label-field ({known})")


def _classified(folder: Path, file: Path, content: Mapping[str, Any]) -> Iterator[Row]:
    classes = content.get("classes")
    for name, label in content["labels"].items():
        found = first_file(folder / "data", f"{name}.*", name)
        if label is None or found is None:
            continue
        yield Row(found, str(classes[label] if classes is not None and isinstance(label, int) else label))


def _box_in_pixels(
    one: Mapping[str, Any], size: Mapping[str, Any], file: Path
) -> tuple[float, float, float, float] | None:
    """FiftyOne's box [left, top, width, height] in shares of the photo, in pixels."""
    if not one.get("bounding_box"):
        return None
    if not size.get("width") or not size.get("height"):
        raise BadInput(
            f"{file}: a sample with boxes has no metadata; call dataset.compute_metadata() before the export"
        )
    left, top, width, height = map(float, one["bounding_box"])
    x, y = size["width"], size["height"]
    return (left * x, top * y, (left + width) * x, (top + height) * y)


def _found(folder: Path, file: Path, name: str) -> Path:
    """The photo of a name: beside its table, below the folder, or in one of the usual folders."""
    places = [file.parent / name, folder / name]
    places += [folder / part / name for part in ("images", "data", "train", "val", "train2017", "val2017")]
    places += [folder / file.stem.removeprefix("instances_") / name]
    return next((place for place in places if place.is_file()), places[0])
