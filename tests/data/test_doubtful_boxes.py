"""Boxes of two kinds look alike in a table; the sizes of the pictures tell them apart where they can be told apart."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.doubtful_boxes import tell_of_doubtful_boxes

WIDTH, HEIGHT = 64, 48
CORNER_AND_SIZE, OUTSIDE = "LOOK LIKE LEFT, TOP, WIDTH, HEIGHT", "REACH OUT OF THEIR PICTURES"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Stored on its side: boxes count pixels of the upright one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.jpg", exif=exif)
    return tmp_path / "a.jpg"


def said(boxes: np.ndarray, picture: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    tell_of_doubtful_boxes([ImageRef(str(row), str(picture), tuple(box)) for row, box in enumerate(boxes.tolist())])
    return caplog.text


def corners(n: int, seed: int) -> np.ndarray:
    """Boxes anywhere in the picture [box, (left, top, right, bottom)]."""
    draw = np.random.default_rng(seed)
    x, y = (np.sort(draw.choice(side + 1, (n, 2)), axis=1) for side in (WIDTH, HEIGHT))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    return boxes[(boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])]


@pytest.mark.parametrize("seed", range(20))
def test_corners_are_taken_and_a_corner_with_a_size_is_told(
    seed: int, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = corners(400, seed)
    assert said(boxes, picture, caplog) == ""
    sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    sizes = sizes[(sizes[:, 0] < sizes[:, 2]) & (sizes[:, 1] < sizes[:, 3])]  # else the table refuses them
    assert CORNER_AND_SIZE in said(sizes, picture, caplog)


def test_few_or_equal_or_middle_boxes_tell_nothing(picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said(np.array([[2, 2, 30, 20]] * 100), picture, caplog) == "", "one fixed camera"
    assert said(np.array([[2, 2, 30 + n, 20] for n in range(5)]), picture, caplog) == ""
    middle = np.array([[n, n, WIDTH - n, HEIGHT - n] for n in range(20)])
    assert said(middle, picture, caplog) == "", "a margin all around"
    assert said(np.array([[0, 0, 10 + n, 10 + n] for n in range(30)]), picture, caplog) == "", "both readings agree"


def test_boxes_of_another_resolution_are_told(picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = said(2 * corners(100, 1), picture, caplog)
    assert OUTSIDE in found
    assert f"in {WIDTH} x {HEIGHT} pixels" in found
    assert CORNER_AND_SIZE in said(corners(400, 1) // 3 * 1 + [1, 1, 2, 2], picture, caplog), "pixels of a smaller one"
    near = np.array([[-1, -1, WIDTH + 1, HEIGHT + 1]] * 20)
    assert said(near, picture, caplog) == "", "a detector may reach a little out"


def test_what_cannot_be_read_here_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.jpg").write_text("none")
    for path in (tmp_path / "absent.jpg", tmp_path / "text.jpg", tmp_path):
        assert said(corners(50, 0) * 9, path, caplog) == ""
    tell_of_doubtful_boxes([])
    tell_of_doubtful_boxes([ImageRef("a", str(tmp_path / "absent.jpg"))])
    assert caplog.text == ""


@pytest.mark.parametrize(
    "names",
    ["x1,y1,x2,y2", "X,Y,W,H", "x_min,y_min,x_max,y_max", "left,top,width,height", "bbox,area",
     "bbox_x,bbox_y,bbox_w,bbox_h"],
)  # fmt: skip
def test_boxes_under_other_names_are_told(names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = ",".join("1" for _ in names.split(","))
    (tmp_path / "df.csv").write_text(f"path,{names}\na.jpg,{values}\n")
    caplog.set_level(logging.WARNING)
    assert len(read_catalogue(str(tmp_path / "df.csv"))) == 1
    (line,) = caplog.messages
    assert f"BOXES ARE NOT READ FROM {', '.join(names.removesuffix(',area').split(','))}, whole pictures are" in line
    caplog.clear()
    (tmp_path / "df.csv").write_text("path,width,height,x,x_1,y_1,x_2,y_2\na.jpg,9,9,1,1,1,5,5\n")
    read_catalogue(str(tmp_path / "df.csv"))
    (tmp_path / "df.csv").write_text("path,width,height,y2\na.jpg,9,9,1\n")
    read_catalogue(str(tmp_path / "df.csv"))
    assert not caplog.messages
