"""The history of runs as a plot, as a section of a run's report, and as a page of its own.

A regression is marked by a cross and a word, not by colour alone.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from distributed_rerank import svg
from distributed_rerank.content_policy import with_policy
from distributed_rerank.report.formatting import fraction, metric_name, signed
from distributed_rerank.storage.files import atomic_path
from distributed_rerank.storage.manifests import rewriting

MAX_RUNS = 60
"""The plot shows this many of the newest runs; the page's table has all."""
WIDTH, HEIGHT = 720, 260
WORD = 100
"""Room of a word in the plot: where marks stand closer, the next ones have none."""
_START, _END = "<!-- trend -->", "<!-- end of trend -->"
_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "svg{width:100%;height:auto}table{border-collapse:collapse;width:100%}"
    "th,td{padding:.5rem .7rem .2rem;text-align:left;vertical-align:bottom}th[scope=row]{white-space:nowrap}"
    ".why td{padding:0 .7rem .5rem;border-bottom:1px solid #8888}small{opacity:.75;overflow-wrap:anywhere}"
    "@media(max-width:40rem){body{font-size:14px}th,td{padding:.5rem .3rem .2rem}.why td{padding:0 .3rem .5rem}}"
)


def trend_plot(history: pd.DataFrame, metric: str) -> Markup:
    """`metric` of the final ranking over the runs of `history`, oldest left, as SVG.

    Runs without the metric are left out. A dashed line is the last run's baseline, a vertical one a new catalogue
    (figures on its two sides cannot be compared).
    """
    runs = history[history[metric].notna()].tail(MAX_RUNS).reset_index(drop=True)
    values = runs[metric].astype(float).tolist()
    baseline = values[-1] - runs["change_from_baseline"].tolist()[-1]
    has_baseline = not math.isnan(baseline)
    shown = [*values, baseline] if has_baseline else values
    margin = 0.08 * max(max(shown) - min(shown), 0.01)
    ticks = svg.ticks(min(shown) - margin, max(shown) + margin)
    # one column for each run, with the run in its middle
    frame = svg.Frame((-0.5, len(runs) - 0.5), (ticks[0], ticks[-1]), WIDTH, HEIGHT, 56, 24, 24, 44)
    parts = frame.grid(ticks)
    if has_baseline:
        parts.append(frame.level(baseline, stroke_dasharray="5 4"))
        parts.append(svg.text(WIDTH - frame.right, frame.y(baseline) - 5, "baseline", "end"))
    catalogues = runs["catalogue"].tolist()
    changes = [frame.x(n - 0.5) for n in range(1, len(runs)) if catalogues[n] != catalogues[n - 1]]
    parts += [svg.line(x, frame.top, x, HEIGHT - frame.bottom, stroke_dasharray="2 3") for x in changes]
    named = _with_room(changes)
    parts += [svg.text(x + 4, frame.top + 10, "new catalogue") for x in named if x + WORD <= WIDTH]
    if len(named) == 1 and named[0] + WORD > WIDTH:
        parts.append(svg.text(named[0] - 4, frame.top + 10, "new catalogue", "end"))
    places = frame.points(range(len(runs)), values)
    parts.append(svg.polyline(places))
    parts += [_point(run, x, y, metric) for (_, run), (x, y) in zip(runs.iterrows(), places, strict=True)]
    words = {x: (y, _word(run)) for (_, run), (x, y) in zip(runs.iterrows(), places, strict=True) if _word(run)}
    for x in _with_room(list(words)):
        y, word = words[x]
        parts.append(svg.text(min(x, WIDTH - WORD / 2), y + 22, word, "middle"))
    ends = {0: "start", len(runs) - 1: "end"} if len(runs) > 1 else {0: "middle"}
    parts += [svg.text(frame.x(row), HEIGHT - 14, str(runs["run_id"][row]), anchor) for row, anchor in ends.items()]
    description = f"{metric_name(metric)} of {len(runs)} runs, last {fraction(values[-1])}"
    return svg.picture(parts, WIDTH, HEIGHT, description)


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
    link_base = Path(os.path.relpath(runs, path.parent))
    rows = [_row(run, metric, link_base) for _, run in history[::-1].iterrows()]
    names = ["Run", metric_name(metric), "From baseline", "From previous"]
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in names)
    page = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Evaluation history</title>\n'
        "<style>{}</style>\n</head>\n<body>\n<main>\n<h1>Evaluation history</h1>\n{}\n<table>\n"
        "<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table>\n</main>\n</body>\n</html>\n"
    )
    text = page.format(Markup(_STYLE), trend_plot(history, metric), head, Markup("\n").join(rows))
    _write(path, with_policy(str(text)))


def _row(run: Any, metric: str, link_base: Path) -> Markup:
    """Two table rows: a run's figures, and its verdict with the reason over the whole width."""
    numbers = [run[name] for name in (metric, "change_from_baseline", "change_from_previous")]
    value, *changes = (None if math.isnan(number) else number for number in numbers)
    digests = ", ".join(
        f"{name} {'none' if pd.isna(run[name]) else str(run[name])[:12]}" for name in ("catalogue", "model")
    )
    report = link_base / run["run_id"] / "report.html"
    link = Markup('<th scope="row"><a href="{}">{}</a></th>').format(report, run["run_id"])
    figures = Markup("").join(Markup("<td>{}</td>").format(cell) for cell in (fraction(value), *map(signed, changes)))
    why = Markup('<tr class="why"><td colspan="4"><strong>{}</strong>: {} <small>({})</small></td></tr>')
    return Markup("<tr>{}{}</tr>\n{}").format(link, figures, why.format(run["verdict"], run["reason"], digests))


def _point(run: Any, x: float, y: float, metric: str) -> Markup:
    """A dot, or a cross for a regression; its tooltip names the run."""
    title = svg.element("title", f"{run['run_id']}: {fraction(run[metric])}, {run['verdict']}")
    if run["exit_code"] == 0:
        return svg.element("circle", title, cx=x, cy=y, r=4, fill="currentColor")
    cross = f"M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"
    return svg.element("path", title, d=cross, stroke="#c62828", stroke_width=3, fill="none")


def _word(run: Any) -> str:
    """What stands at the point of a run; "" at most."""
    return "regression" if run["exit_code"] else "accepted" if run["verdict"] == "accepted" else ""


def _with_room(places: Sequence[float]) -> list[float]:
    """Those of the ascending places that a word fits beside, from the first on."""
    kept: list[float] = []
    for place in places:
        if not kept or place - kept[-1] >= WORD:
            kept.append(place)
    return kept


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
