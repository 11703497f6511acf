"""The picture of a training's curves: what a viewer sees follows the histories."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from distributed_rerank.training.tracking import draw_curves

SVG = "{http://www.w3.org/2000/svg}"


def panels_of(path: Path) -> list[ET.Element]:
    return list(ET.parse(path).getroot().iter(f"{SVG}g"))


def test_curves_have_a_point_for_every_epoch_as_high_as_its_value(tmp_path: Path) -> None:
    judged = [{"loss": loss, "figure": 1 - loss, "first_stage": 0.25} for loss in (0.75, 0.5, 0.375)]
    draw_curves({"half <0>": judged, "all": [{"loss": 0.5}]}, tmp_path / "curves.svg")
    loss, figure = panels_of(tmp_path / "curves.svg")
    heights = [float(point.attrib["cy"]) for point in loss.iter(f"{SVG}circle")]
    assert len(heights) == 4
    assert heights[3] == heights[1], "equal losses of two runs are equally high"
    assert heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[1]), abs=0.2)
    rising = [float(point.attrib["cy"]) for point in figure.iter(f"{SVG}circle")]
    assert rising == sorted(rising, reverse=True)
    assert len(rising) == 3
    dashed = [path for path in figure.iter(f"{SVG}polyline") if "stroke-dasharray" in path.attrib]
    assert len({point.partition(",")[2] for point in dashed[0].attrib["points"].split()}) == 1
    words = [text.text for text in figure.iter(f"{SVG}text")]
    assert "half <0>" in words
    assert "all" not in words, "a run that is not judged has no second curve"


def test_curves_without_a_judged_run_are_one_plot(tmp_path: Path) -> None:
    draw_curves({"all": [{"loss": 1.0}]}, tmp_path / "curves.svg")
    (panel,) = panels_of(tmp_path / "curves.svg")
    assert len(list(panel.iter(f"{SVG}circle"))) == 1
