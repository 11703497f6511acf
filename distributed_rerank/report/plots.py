"""The report's plots as inline SVG; their colours follow the page's light or dark theme."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from distributed_rerank import svg
from distributed_rerank.report.query_examples import values_of

WIDTH, HEIGHT, TOP, BOTTOM = 380, 240, 16, 40
BUCKETS = ((10, math.inf, "10 or more"), (4, 9, "4 to 9"), (2, 3, "2 or 3"), (1, 1, "1"))


def rank_changes(per_query: pd.DataFrame) -> list[tuple[str, int]]:
    """Number of queries by how far their first relevant candidate moved: lost, down, same, up, found.

    A relevant candidate that only one of the two lists holds is lost or found. Queries without one in either list are
    "same".
    """
    before, after = values_of(per_query, "first_hit_before"), values_of(per_query, "first_hit_after")
    places_up = before - after
    counts = [("lost", int(np.sum(~np.isnan(before) & np.isnan(after))))]
    for low, high, name in BUCKETS:
        counts.append((f"down {name}", int(np.sum((-places_up >= low) & (-places_up <= high)))))
    counts.append(("same", int(np.sum((places_up == 0) | (np.isnan(before) & np.isnan(after))))))
    for low, high, name in reversed(BUCKETS):
        counts.append((f"up {name}", int(np.sum((places_up >= low) & (places_up <= high)))))
    counts.append(("found", int(np.sum(np.isnan(before) & ~np.isnan(after)))))
    return counts


def histogram(counts: Sequence[tuple[str, int]], description: str) -> Markup:
    """Bars of the moved queries, best at the top; "same" is not drawn, for it would dwarf the others."""
    moved = [(name, count) for name, count in reversed(counts) if name != "same"]
    highest = max([count for _, count in moved] + [1])
    step, start = (HEIGHT - 8) / len(moved), 112
    parts = [svg.line(start, 2, start, HEIGHT - 4, class_="axis")]
    for position, (name, count) in enumerate(moved):
        y, length = 4 + position * step, (WIDTH - start - 52) * count / highest
        kind = "worse" if name == "lost" or name.startswith("down") else "better"
        parts += [
            svg.element("rect", class_=kind, x=start, y=y + 3, width=length, height=step - 6),
            svg.text(start - 8, y + step / 2 + 4, name, "end"),
            svg.text(start + length + 6, y + step / 2 + 4, f"{count:,}", class_="value"),
        ]
    return _plot(parts, description)


class Point(NamedTuple):
    """A place on a curve; `label` is written below it."""

    x: float
    y: float
    label: str


def curve(
    points: Sequence[Point], base: float, axis: str, description: str, *, is_log: bool = True, marked: str | None = None
) -> Markup:
    """y against x (logarithmic, or linear), with the first stage as a dashed line and a ring around one label's point.

    Points are ascending in x. A label that would run into its right neighbour is left out, never the last one.
    """
    xs = [math.log(point.x) if is_log else point.x for point in points]
    ys = [point.y for point in points]
    ticks = svg.ticks(min([*ys, base]), max([*ys, base]))
    frame = svg.Frame((xs[0], xs[-1]), (ticks[0], ticks[-1]), WIDTH, HEIGHT, 46, 14, TOP, BOTTOM, pad=14)
    places = frame.points(xs, ys)
    # The words on the dashed line stand on the side where the curve is further from it.
    is_left = abs(ys[0] - base) > abs(ys[-1] - base)
    where = (frame.left + 4, "start") if is_left else (WIDTH - frame.right, "end")
    parts = [
        *frame.grid(ticks),
        frame.level(base, class_="base"),
        svg.text(where[0], frame.y(base) - 5, "first stage", where[1], class_="muted"),
        svg.polyline(places, class_="curve"),
    ]
    shown = _room_for_labels([x for x, _ in places], [point.label for point in points])
    for number, ((x, y), point) in enumerate(zip(places, points, strict=True)):
        parts.append(svg.element("circle", class_="point", cx=x, cy=y, r=4))
        if point.label == marked:
            parts.append(svg.element("circle", class_="ring", cx=x, cy=y, r=9))
        if number in shown:
            parts.append(svg.text(x, HEIGHT - 23, point.label, "middle"))
    parts.append(svg.text((frame.left + WIDTH - frame.right) / 2, HEIGHT - 5, axis, "middle", class_="muted"))
    return _plot(parts, description)


def _room_for_labels(places: Sequence[float], labels: Sequence[str]) -> set[int]:
    """Which labels fit side by side, from the last one back."""
    shown: set[int] = set()
    free = math.inf
    for number in range(len(places) - 1, -1, -1):
        half = 4 + 3.8 * len(labels[number])
        if places[number] + half < free:
            shown.add(number)
            free = places[number] - half
    return shown


def distances(histograms: Mapping[str, Any], description: str) -> Markup:
    """Distances of correct candidates (filled) and wrong ones (line), each as shares of their own number.

    The ends of the axis are numbers, or words where distances are fused ones that fall below zero.
    """
    edges = [float(edge) for edge in histograms["edges"]]
    shares = {name: _shares(histograms[name]) for name in ("relevant", "other")}
    highest = max(max(column) for column in shares.values()) or 1.0
    frame = svg.Frame((edges[0], edges[-1]), (0.0, highest), WIDTH, HEIGHT, 8, 8, TOP + 20, BOTTOM)
    # A fused distance has a scale of its own, whose numbers tell nothing.
    ends = [f"{edge:.3g}" for edge in (edges[0], edges[-1])] if edges[0] >= 0 else ["nearer", "farther"]
    parts = []
    for name, kind in (("relevant", "better"), ("other", "wrong")):
        # a step for each bin, from the axis up and back to it: every edge twice, every share twice
        xs = [edge for edge in edges for _ in range(2)]
        ys = [0.0, *(share for share in shares[name] for _ in range(2)), 0.0]
        parts.append(svg.polyline(frame.points(xs, ys), class_=kind))
    return _plot(
        [
            *parts,
            frame.level(0.0, class_="axis"),
            svg.text(8, HEIGHT - 23, ends[0]),
            svg.text(WIDTH - 8, HEIGHT - 23, ends[1], "end"),
            svg.text(WIDTH / 2, HEIGHT - 5, "distance", "middle", class_="muted"),
            svg.element("rect", class_="better", x=8, y=4, width=14, height=12),
            svg.text(28, 14, "correct"),
            svg.line(100, 10, 122, 10, class_="wrong"),
            svg.text(128, 14, "wrong"),
        ],
        description,
    )


def scatter(places: pd.DataFrame, description: str) -> Markup:
    """A dot for each row's `x` and `y`, ringed where `is_right` is False, its `label` and `query_id` on pointing at it.

    Both axes have the same scale.
    """
    xs, ys = places["x"].to_numpy(), places["y"].to_numpy()
    height = WIDTH
    half = max(float(np.ptp(xs)), float(np.ptp(ys)), 1e-9) / 2
    middles = (float(xs.max() + xs.min()) / 2, float(ys.max() + ys.min()) / 2)
    x_range, y_range = ((middle - half, middle + half) for middle in middles)
    frame = svg.Frame(x_range, y_range, WIDTH, height, 8, 8, 28, 8)
    parts = [
        svg.element("circle", class_="right", cx=14, cy=10, r=4),
        svg.text(24, 14, "right thing first"),
        svg.element("circle", class_="missed", cx=154, cy=10, r=4),
        svg.text(164, 14, "something else first"),
    ]
    # The missed ones last, so that no other dot hides them.
    rows = places.sort_values("is_right", ascending=False, kind="stable").to_dict("records")
    for row in rows:
        name = svg.element("title", f"{row['label']}: {row['query_id']}")
        kind = "right" if row["is_right"] else "missed"
        parts.append(svg.element("circle", name, class_=kind, cx=frame.x(row["x"]), cy=frame.y(row["y"]), r=4))
    return svg.picture(parts, WIDTH, height, description, class_="plot")


def overlap(histograms: Mapping[str, Any]) -> float:
    """Area that the two histograms share: 0 where a threshold tells all correct candidates from all wrong ones."""
    both = zip(_shares(histograms["relevant"]), _shares(histograms["other"]), strict=True)
    return sum(min(pair) for pair in both)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _plot(parts: Sequence[Markup], description: str) -> Markup:
    return svg.picture(parts, WIDTH, HEIGHT, description, class_="plot")
