"""The numbers behind the plots, and that the plots show them."""

import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from report_examples import made_up_queries

from distributed_rerank.report.plots import Point, curve, distances, histogram, overlap, rank_changes, scatter

SVG = "{http://www.w3.org/2000/svg}"


def test_rank_changes_count_every_query_once() -> None:
    table = made_up_queries(500)
    counts = dict(rank_changes(table))
    assert sum(counts.values()) == 500
    before, after = (table[f"first_hit_{side}"].fillna(99).astype(int) for side in ("before", "after"))
    assert counts["same"] == (before == after).sum()
    assert counts["up 1"] == ((before - after == 1) & (before < 99)).sum()
    assert counts["lost"] == ((before < 99) & (after == 99)).sum()


def test_histogram_bars_are_as_long_as_their_counts() -> None:
    counts = [("lost", 2), ("same", 90), ("up 1", 8), ("found", 0)]
    root = ET.fromstring(histogram(counts, "moves <&>"))
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect")]
    assert widths == pytest.approx([0, 4 * widths[2], widths[2]], abs=0.2), "found, up 1, lost; same is not drawn"
    assert root.attrib["aria-label"] == "moves <&>"


def test_curve_marks_one_point_and_leaves_out_labels_that_collide() -> None:
    points = [Point(x, y, str(x)) for x, y in ((100, 0.5), (101, 0.6), (500, 0.7))]
    root = ET.fromstring(curve(points, 0.55, "top_n", "a curve", marked="500"))
    rings = [ring for ring in root.iter(f"{SVG}circle") if ring.attrib["class"] == "ring"]
    dots = [dot for dot in root.iter(f"{SVG}circle") if dot.attrib["class"] == "point"]
    assert [ring.attrib["cx"] for ring in rings] == [dots[2].attrib["cx"]]
    heights = [float(dot.attrib["cy"]) for dot in dots]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"101", "500", "first stage"} <= set(words)
    assert "100" not in words


def test_distances_fill_the_frame_and_overlap_is_the_shared_area() -> None:
    histograms = {"edges": [0.0, 0.5, 1.0], "relevant": [3, 1], "other": [0, 8]}
    assert overlap(histograms) == 0.25
    root = ET.fromstring(distances(histograms, "two histograms"))
    relevant, other = (
        np.array([point.split(",") for point in path.attrib["points"].split()], float)
        for path in root.iter(f"{SVG}polyline")
    )
    bottom = relevant[0, 1]
    assert relevant[:, 0].tolist() == other[:, 0].tolist() == [8, 8, 190, 190, 372, 372]
    heights = bottom - np.array([relevant[1, 1], relevant[3, 1], other[3, 1]])
    assert heights / heights[2] == pytest.approx([0.75, 0.25, 1.0], abs=0.01)


def test_a_fused_distance_below_zero_has_no_number_on_its_axis() -> None:
    counts = {"relevant": [3, 1], "other": [0, 4]}
    plain, fused = (distances({"edges": [low, 0.5, 1.0], **counts}, "words") for low in (0.25, -0.25))
    assert ">0.25<" in plain
    assert "nearer" not in plain
    assert "nearer" in fused
    assert "-0.25" not in fused


def test_map_has_a_dot_for_each_query_the_missed_ones_last_and_no_label_that_runs() -> None:
    places = pd.DataFrame(
        {
            "query_id": ["a", "b", "c"], "label": ["x", "<script>", "y"], "x": [0.0, 2.0, 1.0], "y": [0.0, 0.0, 1.0],
            "is_right": [False, True, True],
        }
    )  # fmt: skip
    picture = scatter(places, "three")
    assert picture.count("<title>") == 3
    assert picture.index("x: a") > max(picture.index("y: c"), picture.index("b</title>"))
    assert "<script>" not in picture
