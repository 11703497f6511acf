"""The trend plot: well-formed, true to the rows, put into a report once."""

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest

from distributed_rerank.monitoring.trend import MAX_RUNS, trend_plot, write_page, write_trend

SVG = "{http://www.w3.org/2000/svg}"


def history(values: list[float], **columns: list) -> pd.DataFrame:
    n = len(values)
    ids = [f"2026-11-{day + 1:02d} <&>" for day in range(n)]
    rest = {"exit_code": [0] * n, "verdict": ["no regression"] * n, "reason": ["as <ever>"] * n}
    changes = {"change_from_baseline": [float("nan")] * n, "change_from_previous": [float("nan")] * n}
    return pd.DataFrame(
        {"run_id": ids, "model": [None] * n, "catalogue": ["c"] * n, "map@10": values, **rest, **changes, **columns}
    )


def test_trend_plot_heights_follow_the_values() -> None:
    root = ET.fromstring(trend_plot(history([0.5, 0.7, 0.6]), "map@10"))
    heights = [float(point.attrib["cy"]) for point in root.iter(f"{SVG}circle")]
    assert heights[0] > heights[2] > heights[1]
    assert heights[0] - heights[1] == pytest.approx(2 * (heights[2] - heights[1]), abs=0.2)
    assert root.attrib["aria-label"] == "mAP@10 of 3 runs, last 0.600"


def test_trend_plot_says_regression_new_catalogue_and_baseline_in_words() -> None:
    columns = {"exit_code": [0, 3], "catalogue": ["a", "b"], "change_from_baseline": [0.0, -0.1]}
    root = ET.fromstring(trend_plot(history([0.5, 0.4], **columns), "map@10"))
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"regression", "new catalogue", "baseline"} <= set(words)
    assert len(list(root.iter(f"{SVG}circle"))) == 1


def test_words_of_a_plot_do_not_lie_on_each_other() -> None:
    """A catalogue that changes every night, and ten nights that a regression fails."""
    n = 30
    columns = {"exit_code": [0] * 20 + [3] * 10, "catalogue": [str(night) for night in range(n)]}
    root = ET.fromstring(trend_plot(history([0.5] * 20 + [0.4] * 10, **columns), "map@10"))
    assert len([line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray") == "2 3"]) == n - 1
    assert len([path for path in root.iter(f"{SVG}path") if path.get("stroke") == "#c62828"]) == 10
    for word in ("new catalogue", "regression"):
        found = [element for element in root.iter(f"{SVG}text") if element.text == word]
        places = sorted(float(element.attrib["x"]) for element in found)
        assert places
        assert all(later - earlier >= 80 for earlier, later in itertools.pairwise(places))


def test_a_catalogue_that_is_new_in_the_last_run_is_named_within_the_frame() -> None:
    root = ET.fromstring(trend_plot(history([0.5] * 40, catalogue=["a"] * 39 + ["b"]), "map@10"))
    (word,) = [element for element in root.iter(f"{SVG}text") if element.text == "new catalogue"]
    assert word.attrib["text-anchor"] == "end"


@pytest.mark.parametrize("n", [1, 2, MAX_RUNS + 40])
def test_trend_plot_of_any_number_of_runs_stays_within_its_frame(n: int) -> None:
    root = ET.fromstring(trend_plot(history([0.5] * n), "map@10"))
    points = list(root.iter(f"{SVG}circle"))
    assert len(points) == min(n, MAX_RUNS)
    assert all(50 < float(point.attrib["cx"]) < 700 for point in points)
    assert all(20 < float(point.attrib["cy"]) < 220 for point in points)


def test_write_trend_twice_leaves_one_section_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<main>\n<p>figures</p>\n</main>\n<footer></footer>\n")
    for values in ([0.1], [0.5, 0.4], [0.5, 0.4]):
        write_trend(tmp_path, history(values), "map@10")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == page.count('id="h-trend"') == 1
    assert page.startswith("<main>\n<p>figures</p>\n<!-- trend -->")
    assert page.endswith("<!-- end of trend -->\n</main>\n<footer></footer>\n")
    assert "of 2 runs" in page
    assert (tmp_path / "trend.svg").read_text().strip() in page


def test_write_page_has_a_row_and_a_link_for_every_run_newest_first(tmp_path: Path) -> None:
    write_page(tmp_path / "history.html", history([0.5, 0.4, float("nan")]), "map@10", tmp_path / "runs")
    page = (tmp_path / "history.html").read_text()
    assert page.count("<tr>") == 4
    assert page.index("2026-11-03") < page.index('href="runs/2026-11-02 &lt;&amp;&gt;/report.html"')
    assert "<ever>" not in page
    assert page.count("<strong>no regression</strong>: as &lt;ever&gt; <small>(catalogue c, model none)</small>") == 3
