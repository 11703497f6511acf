"""Parts of plots: what users wrote stays text, data land where they belong, ticks enclose them."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from distributed_rerank import svg

HOSTILE = """<script>"'&"""


def test_element_escapes_text_and_attributes_once() -> None:
    inner = svg.element("title", HOSTILE)
    root = ET.fromstring(svg.element("circle", inner, class_=HOSTILE, stroke_width=2, cx=1.26))
    assert root.attrib == {"class": HOSTILE, "stroke-width": "2", "cx": "1.3"}
    assert root[0].text == HOSTILE
    assert svg.element("g") == "<g/>"


def test_picture_is_well_formed_and_named() -> None:
    parts = [svg.text(1, 2, HOSTILE, "end"), svg.line(0, 0, 1, 1), svg.polyline([(0, 0), (1, 2.25)], stroke="red")]
    root = ET.fromstring(svg.picture(parts, 30, 20, HOSTILE, class_="plot"))
    assert (root.attrib["viewBox"], root.attrib["aria-label"]) == ("0 0 30 20", HOSTILE)
    words, line, path = root
    assert (words.text, words.attrib["text-anchor"]) == (HOSTILE, "end")
    assert line.attrib["stroke"] == "currentColor"
    assert (path.attrib["points"], path.attrib["stroke"], path.attrib["fill"]) == ("0.0,0.0 1.0,2.2", "red", "none")


def test_frame_maps_the_ranges_onto_what_the_margins_leave() -> None:
    frame = svg.Frame((-1, 3), (10, 30), width=200, height=100, left=20, right=30, top=5, bottom=15, pad=10)
    assert [frame.x(value) for value in (-1, 1, 3)] == [30, 95, 160]
    assert [frame.y(value) for value in (10, 20, 30)] == [85, 45, 5]
    assert svg.Frame((7, 7), (0, 1), 200, 100, 20, 30, 5, 15).x(7) == 20, "a single x is no division by zero"


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_and_enclose_the_range(seed: int) -> None:
    generator = np.random.default_rng(seed)
    low = float(generator.normal() * 10 ** generator.uniform(-3, 3))
    high = low + float(10 ** generator.uniform(-5, 3)) * (seed > 0)
    ticks = svg.ticks(low, high)
    assert 3 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step)
    assert ticks[0] <= low + 1e-9 * step
    assert ticks[-1] >= high - 1e-9 * step
    leading = step / 10 ** np.floor(np.log10(step) + 1e-9)
    assert min(abs(leading - digit) for digit in (1, 2, 5)) < 1e-6
