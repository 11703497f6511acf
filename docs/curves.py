"""Draw the curves of docs/worth.md from its tables: python docs/curves.py writes docs/curves/*.svg."""

import re
from pathlib import Path

from distributed_rerank.report.plots import Point, curve

DOCS = Path(__file__).resolve().parent
COLOURS = ".curve { stroke: #2f6feb; stroke-width: 2 } .point { fill: #2f6feb } .base, .axis { stroke: #888 }"
COLOURS += " .base { stroke-dasharray: 5 4 } text { fill: #888 } line { stroke: #888; stroke-opacity: 0.5 }"
CURVES = {
    "first_stage": ("first stage, mAP@10", 1, 0.0, False),
    "train_labels": ("train labels", 1, 0.0, True),
    "top_n": ("`top_n`", 1, 0.606, True),
}
"""File name -> head of the table's first column, column of y, value of the first stage, logarithmic or not."""


def drawn(text: str) -> dict[str, str]:
    """Each picture by its file name, from the page's text."""
    pictures = {}
    for name, (head, column, base, is_log) in CURVES.items():
        table = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert table, f"no table begins with {head}"
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
        points = [Point(float(row[0]), float(row[column]), row[0]) for row in rows]
        description = ", ".join(f"{row[0]}: {row[column]}" for row in rows)
        picture = str(curve(points, base, head.strip("`"), description, is_log=is_log))
        pictures[name] = picture.replace(">", f"><style>{COLOURS}</style>", 1) + "\n"
    return pictures


if __name__ == "__main__":
    (DOCS / "curves").mkdir(exist_ok=True)
    for name, picture in drawn((DOCS / "worth.md").read_text(encoding="utf-8")).items():
        (DOCS / "curves" / f"{name}.svg").write_text(picture, encoding="utf-8")
