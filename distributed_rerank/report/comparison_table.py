"""Comparisons of every two results as one table: Markdown for a pull request, LaTeX for a paper, HTML for the rest."""

import html
import re
from collections.abc import Mapping
from typing import Any

from distributed_rerank.content_policy import with_policy
from distributed_rerank.report.formatting import MINUS, count_of, fraction, interval, metric_name, signed

_HEADS = ("A", "B", "metric", "A is", "B is", f"B {MINUS} A", "95 % interval", "p", "p (Holm)", "better, worse")
_N_TEXTS = 3
"""Columns that are text; the others are numbers."""
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MINUS: "$-$"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
_STYLE = "body{font:16px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}table{border-collapse:collapse}"
_STYLE += "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}"
_STYLE += "td.t,th.t{text-align:left;white-space:normal}div{overflow-x:auto}"


def in_all_formats(summary: Mapping[str, Any]) -> dict[str, str]:
    """The text of the table by file ending: md, tex, html."""
    rows, note = _rows(summary), _note(summary)
    return {"md": _markdown(rows, note), "tex": _latex(rows, note), "html": _html(rows, note)}


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
    values = {run["name"]: run for run in summary["runs"]}
    return [
        [
            pair["baseline"],
            pair["run"],
            metric_name(pair["metric"]),
            fraction(values[pair["baseline"]][pair["metric"]]),
            fraction(values[pair["run"]][pair["metric"]]),
            signed(pair["mean"]),
            interval(pair),
            f"{pair['p_value']:.4f}",
            f"{pair['p_holm']:.4f}" + ("*" if pair["p_holm"] < 0.05 else ""),
            f"{count_of(pair['n_better'])}, {count_of(pair['n_worse'])}",
        ]
        for pair in summary["pairs"]
    ]


def _note(summary: Mapping[str, Any]) -> str:
    n_tests = len(summary["pairs"])
    return (
        f"{count_of(summary['n_queries'])} queries of {count_of(summary['n_labels'])} labels, catalogue "
        f"{summary['catalogue'][:16]}. Differences are paired by query; intervals and p-values are by label. "
        f"p (Holm) is corrected for {n_tests} comparisons; * = below 0.05.{_missing(summary)}"
    )


def _missing(summary: Mapping[str, Any]) -> str:
    """What became of queries that a file has no list for; "" where each has one."""
    becomes = {"miss": "count as misses", "leave_out": "are left out of all results"}
    return "".join(
        f" {name} has no list for {count_of(number)} of the queries, which {becomes[summary['missing_lists']]}."
        for name, number in summary.get("n_missing", {}).items()
    )


def _markdown(rows: list[list[str]], note: str) -> str:
    escaped = [[re.sub(r"([\\|*_`<\[])", r"\\\1", cell) for cell in row] for row in rows]
    lines = [note.replace("*", r"\*"), "", f"| {' | '.join(_HEADS)} |"]
    lines.append("|" + ":--|" * _N_TEXTS + "--:|" * (len(_HEADS) - _N_TEXTS))
    lines += [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join(lines) + "\n"


def _latex(rows: list[list[str]], note: str) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join("".join(_LATEX.get(sign, sign) for sign in cell) for cell in cells) + r" \\"

    body = [line(list(_HEADS)), r"\hline", *(line(row) for row in rows)]
    columns = "l" * _N_TEXTS + "r" * (len(_HEADS) - _N_TEXTS)
    return "\n".join([f"% {note}", rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", ""])


def _html(rows: list[list[str]], note: str) -> str:
    def line(cells: list[str], tag: str) -> str:
        words = (
            f"<{tag}{' class=t' if place < _N_TEXTS else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(words)}</tr>"

    table = "\n".join([line(list(_HEADS), "th"), *(line(row, "td") for row in rows)])
    return with_policy(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Comparison</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>Comparison</h1>\n<p>{html.escape(note)}</p>\n<div><table>\n{table}\n</table></div>\n</body>\n</html>\n"
    )
