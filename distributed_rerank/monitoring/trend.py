"""The history of runs as a plot, as a section of a run's report, and as a page of its own. Layer 3.

The plot is written by hand like the report's: the same bytes everywhere, text that stays text, colours of the page
around it. What is a regression is told by a cross and a word, not by colour alone.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from distributed_rerank.data.files import atomic_path
from distributed_rerank.data.manifests import rewriting
from distributed_rerank.report.formatting import fraction, metric_name, signed

MAX_RUNS = 60
"""The newest so many are drawn; the page's table has all."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720.0, 260.0, 56.0, 24.0, 24.0, 44.0
_START, _END = "<!-- trend -->", "<!-- end of trend -->"
_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "svg{width:100%;height:auto}div{overflow-x:auto}table{border-collapse:collapse}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #8888;text-align:left;vertical-align:top}"
    "th{white-space:nowrap}td:nth-child(5){min-width:18rem}"
)


def trend_plot(history: pd.DataFrame, metric: str) -> Markup:
    """`metric` of the final ranking over the runs of `history`, oldest left, as SVG.

    Runs without the metric are left out. A dashed line is the last run's baseline, a vertical one a new catalogue
    (figures on its two sides cannot be compared).
    """
    runs = history[history[metric].notna()].tail(MAX_RUNS).reset_index(drop=True)
    values = np.asarray(runs[metric], dtype=np.float64)
    baseline = values[-1] - np.asarray(runs["change_from_baseline"], dtype=np.float64)[-1]
    shown = values if np.isnan(baseline) else np.append(values, baseline)
    middle, reach = (shown.max() + shown.min()) / 2, max((shown.max() - shown.min()) / 2, 0.005) * 1.15
    step = (WIDTH - LEFT - RIGHT) / len(runs)
    x = LEFT + step * (np.arange(len(runs)) + 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (middle + reach - value) / (2 * reach)

    parts = []
    for value in (middle - reach, middle, middle + reach):
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), 'stroke-opacity="0.2"'))
        parts.append(_text(LEFT - 6, y(value) + 4, fraction(value), "end"))
    if not np.isnan(baseline):
        parts.append(_line(LEFT, y(baseline), WIDTH - RIGHT, y(baseline), 'stroke-dasharray="5 4"'))
        parts.append(_text(WIDTH - RIGHT, y(baseline) - 5, "baseline", "end"))
    catalogues = runs["catalogue"].tolist()
    for middle_of_run, old, new in zip(x[1:].tolist(), catalogues, catalogues[1:], strict=False):
        if old != new:
            between = middle_of_run - step / 2
            parts.append(_line(between, TOP, between, HEIGHT - BOTTOM, 'stroke-dasharray="2 3"'))
            parts.append(_text(between + 4, TOP + 10, "new catalogue", "start"))
    points = " ".join(f"{place:.1f},{y(value):.1f}" for place, value in zip(x.tolist(), values.tolist(), strict=True))
    parts.append(Markup('<polyline points="{}" fill="none" stroke="currentColor"/>').format(points))
    parts += [_point(run, x[row], y(values[row]), metric) for row, (_, run) in enumerate(runs.iterrows())]
    ends = {0: "start", len(runs) - 1: "end"} if len(runs) > 1 else {0: "middle"}
    parts += [_text(x[row], HEIGHT - 14, str(runs["run_id"][row]), anchor) for row, anchor in ends.items()]
    said = f"{metric_name(metric)} of {len(runs)} runs, last {fraction(values[-1])}"
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}" '
        'font-family="system-ui, sans-serif" font-size="13">{}</svg>'
    ).format(f"{WIDTH:g}", f"{HEIGHT:g}", said, Markup("").join(parts))


def write_trend(folder: Path, history: pd.DataFrame, metric: str) -> None:
    """Write `trend.svg` into a run's folder and the same plot into its report.html, replacing an earlier one."""
    plot = trend_plot(history, metric)
    _write(folder / "trend.svg", f"{plot}\n")
    report = folder / "report.html"
    if not report.is_file():
        return
    page = re.sub(f"{_START}.*?{_END}\n", "", report.read_text(encoding="utf-8"), flags=re.DOTALL)
    head, end, tail = page.rpartition("</main>")
    assert end, f"{report} has no </main> to put the trend before"
    reason = escape(history["reason"].iloc[-1])
    section = f'<section aria-labelledby="h-trend">\n<h2 id="h-trend">Trend</h2>\n<p>{reason}</p>\n{plot}\n</section>\n'
    page = f"{head}{_START}\n{section}{_END}\n{end}{tail}"
    if page != report.read_text(encoding="utf-8"):
        with rewriting(report):
            _write(report, page)


def write_page(path: Path, history: pd.DataFrame, metric: str, runs: Path) -> None:
    """Write the page of all runs, newest first, with links to the reports in the folder `runs`."""
    rows = [_row(run, metric, Path(os.path.relpath(runs, path.parent))) for _, run in history[::-1].iterrows()]
    heads = ["Run", metric_name(metric), "From baseline", "From previous", "Verdict", "Catalogue", "Model"]
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in heads)
    page = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Evaluation history</title>\n'
        "<style>{}</style>\n</head>\n<body>\n<main>\n<h1>Evaluation history</h1>\n{}\n<div>\n<table>\n"
        "<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table>\n</div>\n</main>\n</body>\n</html>\n"
    )
    _write(path, page.format(Markup(_STYLE), trend_plot(history, metric), head, Markup("\n").join(rows)))


def _row(run: Any, metric: str, runs: Path) -> Markup:
    changes = [None if np.isnan(run[name]) else run[name] for name in ("change_from_baseline", "change_from_previous")]
    value = None if np.isnan(run[metric]) else run[metric]
    digests = [str(run[name] or "none")[:12] for name in ("catalogue", "model")]
    report = runs / run["run_id"] / "report.html"
    link = Markup('<th scope="row"><a href="{}">{}</a></th>').format(report, run["run_id"])
    verdict = Markup("<strong>{}</strong>: {}").format(run["verdict"], run["reason"])
    cells = [fraction(value), *map(signed, changes), verdict, *digests]
    return Markup("<tr>{}{}</tr>").format(link, Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells))


def _point(run: Any, x: float, y: float, metric: str) -> Markup:
    title = Markup("<title>{}: {}, {}</title>").format(run["run_id"], fraction(run[metric]), run["verdict"])
    if run["exit_code"] == 0:
        circle = Markup('<circle cx="{}" cy="{}" r="4" fill="currentColor">{}</circle>')
        return circle.format(f"{x:.1f}", f"{y:.1f}", title)
    cross = f"M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"
    mark = Markup('<path d="{}" stroke="#c62828" stroke-width="3" fill="none">{}</path>').format(cross, title)
    return mark + _text(x, y + 22, "regression", "middle")


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return Markup(f'<line {ends} stroke="currentColor" {style}/>')


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    template = '<text x="{}" y="{}" text-anchor="{}" fill="currentColor">{}</text>'
    return Markup(template).format(f"{x:.1f}", f"{y:.1f}", anchor, text)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
