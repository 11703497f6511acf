"""The generated catalogue: deterministic, readable, fair splits, and look-alikes that differ locally."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageChops

from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.demo.camera import take_photo
from distributed_rerank.demo.catalogue import design_family, write_demo_catalogue
from distributed_rerank.demo.drawing import SIDE, draw_design
from distributed_rerank.errors import BadInput


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_catalogue(tmp_path_factory.mktemp("demo"), n_designs=48, n_images=3, size=64, seed=3)


def test_demo_catalogue_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_demo_catalogue(tmp_path / "a", n_designs=8, n_images=2, size=64)
    second = write_demo_catalogue(tmp_path / "b", n_designs=8, n_images=2, size=64)
    files = sorted(path.relative_to(first.parent) for path in first.parent.rglob("*") if path.is_file())
    assert len(files) == 8 * 2 + 1
    assert all((first.parent / name).read_bytes() == (second.parent / name).read_bytes() for name in files)


def test_demo_catalogue_other_seed_gives_other_photos(tmp_path: Path) -> None:
    first = write_demo_catalogue(tmp_path / "a", n_designs=5, n_images=2, size=64, seed=0)
    second = write_demo_catalogue(tmp_path / "b", n_designs=5, n_images=2, size=64, seed=1)
    photos = [{path.read_bytes() for path in table.parent.rglob("*.jpg")} for table in (first, second)]
    assert photos[0].isdisjoint(photos[1])


def test_demo_catalogue_more_images_leave_the_first_ones_alone(tmp_path: Path) -> None:
    few = write_demo_catalogue(tmp_path / "few", n_designs=5, n_images=2, size=64)
    many = write_demo_catalogue(tmp_path / "many", n_designs=9, n_images=3, size=64)
    for path in few.parent.rglob("*.jpg"):
        assert path.read_bytes() == (many.parent / path.relative_to(few.parent)).read_bytes()


def test_demo_catalogue_is_read_without_complaint_and_has_its_sizes(table: Path) -> None:
    catalogue = read_catalogue(str(table), purpose="evaluation")
    assert len(catalogue.table) == 48 * 3
    with Image.open(catalogue.table["path"][0]) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")


def test_demo_catalogue_splits_share_no_family_but_every_kind(table: Path) -> None:
    frame = pd.read_csv(table)
    frame["family"] = frame["label"].str[:-1]
    sides = dict(iter(frame.groupby("split")))
    assert set(sides) == {"train", "validation"}
    assert set(sides["train"]["family"]).isdisjoint(sides["validation"]["family"])
    assert set(sides["train"]["category"]) == set(sides["validation"]["category"])
    assert len(sides["train"]) == len(sides["validation"])


def test_demo_catalogue_validation_rows_alone_are_query_and_gallery(table: Path) -> None:
    frame = pd.read_csv(table)
    is_evaluated = frame["split"] == "validation"
    assert (frame["is_query"] == is_evaluated).all()
    assert (frame["is_gallery"] == is_evaluated).all()


def test_design_family_both_splits_meet_every_detail() -> None:
    families = [design_family(number, seed=0) for number in range(30)]
    for split in ("train", "validation"):
        assert len({family.detail for family in families if family.split == split}) == 5


@pytest.mark.parametrize("number", range(10))
def test_design_family_variants_differ_visibly_and_in_one_place_only(number: int) -> None:
    drawings = [draw_design(design) for design in design_family(number, seed=0).designs]
    for left in range(4):
        for right in range(left):
            difference = ImageChops.difference(drawings[left].convert("RGB"), drawings[right].convert("RGB"))
            share = (np.asarray(difference).max(axis=2) > 40).mean()
            assert 12 / SIDE**2 < share < 0.10


def test_take_photo_stores_any_quality_and_the_same_state_gives_the_same_photo() -> None:
    flat = draw_design(design_family(0, seed=0).designs[0])
    photo, quality = take_photo(flat, 96, np.random.default_rng(5))
    again, same_quality = take_photo(flat, 96, np.random.default_rng(5))
    assert photo.tobytes() == again.tobytes()
    assert quality == same_quality
    assert 35 <= quality <= 92
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality)
    assert 500 < buffer.tell() < 20_000


@pytest.mark.parametrize("wrong", [{"n_designs": 4}, {"n_images": 1}, {"size": 20}])
def test_demo_catalogue_too_small_is_bad_input_that_names_the_value(tmp_path: Path, wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(BadInput, match=f"{name}={value}"):
        write_demo_catalogue(tmp_path, **wrong)
