"""The report's plots as inline SVG. Layer 3.

Written by hand rather than by a plotting library: the same bytes everywhere, text that stays text, and
colours that follow the page's light or dark theme through its CSS classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from distributed_rerank.procedures.report.strips import values_of

WIDTH, HEIGHT = 380.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 16.0, 40.0
BUCKETS = ((10, math.inf, "10 or more"), (4, 9, "4 to 9"), (2, 3, "2 or 3"), (1, 1, "1"))


def rank_changes(per_query: pd.DataFrame) -> list[tuple[str, int]]:
    """How many queries' first relevant candidate moved how far: from lost, over places down and up, to found.

    A relevant candidate that is in the list on one side only counts as lost or found; the unchanged, and
    those in neither list, are the bucket "same".
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
    step, start = (HEIGHT - 8) / len(moved), 112.0
    parts = [_line(start, 2.0, start, HEIGHT - 4, "axis")]
    for position, (name, count) in enumerate(moved):
        y, length = 4 + position * step, (WIDTH - start - 52) * count / highest
        kind = "worse" if name == "lost" or name.startswith("down") else "better"
        size = f'width="{length:.1f}" height="{step - 6:.1f}"'
        parts.append(f'<rect class="{kind}" x="{start}" y="{y + 3:.1f}" {size}/>')
        parts.append(_text(start - 8, y + step / 2 + 4, name, "end"))
        parts.append(_text(start + length + 6, y + step / 2 + 4, f"{count:,}", "value"))
    return _svg(parts, description)


def curve(
    points: Sequence[Mapping[str, Any]], first_stage: Mapping[str, float], metric: str, description: str
) -> Markup:
    """`metric` against top_n (logarithmic), with the first stage as a dashed line."""
    ns = [float(point["top_n"]) for point in points]
    values = [float(point["metrics"][metric]) for point in points]
    base = float(first_stage[metric])
    ticks = _ticks(min([*values, base]), max([*values, base]))
    span = math.log(max(ns) / min(ns)) or 1.0

    def x(n: float) -> float:
        return LEFT + 14 + (WIDTH - LEFT - RIGHT - 28) * math.log(n / min(ns)) / span

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        parts += [
            _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
            _text(LEFT - 6, y(tick) + 4, f"{tick:.3f}", "end muted"),
        ]
    parts += [
        _line(LEFT, y(base), WIDTH - RIGHT, y(base), "base"),
        _text(WIDTH - RIGHT, y(base) - 5, "first stage", "end muted"),
    ]
    path = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in zip(ns, values, strict=True))
    parts.append(f'<polyline class="curve" points="{path}"/>')
    taken = -math.inf
    for n, value in zip(ns, values, strict=True):
        parts.append(f'<circle class="point" cx="{x(n):.1f}" cy="{y(value):.1f}" r="4"/>')
        if x(n) - taken > 26:
            parts.append(_text(x(n), HEIGHT - 23, f"{n:g}", "middle"))
            taken = x(n)
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "re-ranked candidates per query (top_n)", "middle muted")
    )
    return _svg(parts, description)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round values that enclose [low, high]."""
    span = max(high - low, 0.004)
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 2) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def _svg(parts: Sequence[str], description: str) -> Markup:
    name = escape(description)
    head = f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{name}">'
    # Safe to pass the template's escaping by: every text in `parts` went through escape.
    return Markup(head + "".join(parts) + "</svg>")
