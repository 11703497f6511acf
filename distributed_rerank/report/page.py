"""Builds the report: metrics and per-query values in, one HTML file out. Layer 3.

Every figure on the page is in metrics.json or per_query.parquet, or is a difference, share or count of such.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.report import plots
from distributed_rerank.report.baselines import baseline_rows
from distributed_rerank.report.cost import adaptive_part, cost_rows, curve_plots, distance_plots
from distributed_rerank.report.formatting import (
    count_of,
    flatten,
    fraction,
    metric_name,
    p_value,
    short,
    signed,
    verdict,
)
from distributed_rerank.report.query_examples import (
    SHOWN_CANDIDATES,
    SHOWN_PER_GROUP,
    Strip,
    choose_queries,
    is_reranked,
    thumbnail,
    values_of,
)

MAX_ROWS = 2000
MAX_REJECTS = 200
TEMPLATE = "report.html.j2"


def build_report(
    metrics: Mapping[str, Any],
    per_query: pd.DataFrame,
    strips: Sequence[Strip],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    out: Path,
    rejects: pd.DataFrame | None = None,
    timings: Mapping[str, Any] | None = None,
    suspects: Sequence[tuple[ImageRef, ImageRef]] = (),
) -> Path:
    """Write the report to the file `out` and return it.

    `metrics` is the content of metrics.json, `per_query` the table of that name. Of `strips` those are
    shown whose query `choose_queries(per_query)` names, in its order; their images are read now and
    embedded as thumbnails, like those of `suspects`, which belong to `metrics["suspects"]` one by one. `timings` is the
    content of timings.json. The same arguments give the same bytes. Without `metrics["reranked"]` it
    describes the first stage alone.
    """
    timings = timings or {}
    both = bool(metrics.get("reranked")) and is_reranked(per_query)
    page = {
        "metrics": metrics,
        "both": both,
        "verdict": verdict(metrics, both),
        "metric_rows": _metric_rows(metrics, both),
        "oml_rows": _oml_rows(metrics, both),
        "plots": curve_plots(metrics, timings) if both else [],
        "costs": cost_rows(metrics, timings),
        "baselines": baseline_rows(metrics, timings),
        "adaptive": adaptive_part(metrics),
        "distances": [*([_rank_changes(per_query)] if both else []), *distance_plots(metrics)],
        "suspects": _suspects(metrics, suspects),
        "categories": _categories(metrics, per_query, both),
        "groups": _groups(per_query, strips, both),
        "queries": _query_rows(per_query, both),
        "n_measured": len(per_query),
        "rejects": [] if rejects is None else rejects.head(MAX_REJECTS).astype(str).to_dict("records"),
        "n_rejects_listed": 0 if rejects is None else len(rejects),
        "cost": flatten(metrics.get("cost") or {}),
        "config": flatten(config),
        "environment": flatten(environment),
    }
    out.write_text(_template().render(page) + "\n", encoding="utf-8", newline="\n")
    return out


def _template() -> Template:
    """The page's template with the filters it uses."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fraction": fraction,
        "signed": signed,
        "p_value": p_value,
        "count": count_of,
        "metric": metric_name,
        "short": short,
    }
    return environment.get_template(TEMPLATE)


def _metric_rows(metrics: Mapping[str, Any], both: bool) -> list[dict[str, Any]]:
    rows = []
    for key, before in metrics["first_stage"].items():
        row: dict[str, Any] = {"key": key, "before": before}
        if both:
            compared = metrics.get("difference", {}).get(key, {})
            after = metrics["reranked"][key]
            row |= {
                "after": after,
                "difference": compared.get("mean", after - before),
                "ci95": compared.get("ci95"),
                "p_value": compared.get("p_value"),
                "n_better": compared.get("n_better"),
                "n_worse": compared.get("n_worse"),
                "oracle": (metrics.get("oracle") or {}).get(key),
            }
        rows.append(row)
    return rows


def _oml_rows(metrics: Mapping[str, Any], both: bool) -> list[dict[str, Any]]:
    oml = metrics.get("oml") or {}
    after = oml.get("reranked") or {}
    return [
        {"key": key, "before": before, "after": after.get(key) if both else None}
        for key, before in (oml.get("first_stage") or {}).items()
    ]


def _rank_changes(per_query: pd.DataFrame) -> dict[str, Any]:
    """How far the first correct candidates moved."""
    counts = plots.rank_changes(per_query)
    said = ", ".join(f"{name}: {count}" for name, count in counts)
    same = dict(counts)["same"]
    caption = (
        f"Queries by the places that their first correct candidate moved. For {count_of(same)} of "
        f"{count_of(len(per_query))} it did not move (not drawn). Lost, found: it left or entered the list."
    )
    picture = plots.histogram(counts, f"Queries by rank change of the first correct candidate: {said}")
    return {"title": "Rank changes", "picture": picture, "caption": caption}


def _suspects(metrics: Mapping[str, Any], images: Sequence[tuple[ImageRef, ImageRef]]) -> list[dict[str, Any]]:
    """The suspected pairs with their pictures."""
    found = metrics.get("suspects") or []
    assert not images or len(images) == len(found), "each suspected pair has two images"
    return [pair | {"pictures": [thumbnail(image) for image in both]} for pair, both in zip(found, images)]  # noqa: B905


def _categories(metrics: Mapping[str, Any], per_query: pd.DataFrame, both: bool) -> list[dict[str, Any]]:
    """Means within each category, the largest loss of mAP@10 first; ties by name."""
    if "category" not in per_query.columns or len(per_query["category"].dropna()) == 0:
        return []
    keys = [key for key in ("cmc@1", "map@10") if f"{key}_before" in per_query.columns]
    names, numbers = np.unique(per_query["category"].fillna("(none)").astype(str).to_numpy(str), return_inverse=True)
    rows = []
    for number, name in enumerate(names.tolist()):
        members = numbers == number
        compared = (metrics.get("categories") or {}).get(name, {}).get("difference", {}).get("map@10")
        row: dict[str, Any] = {"name": name, "n_queries": int(members.sum()), "values": [], "compared": compared}
        for key in keys:
            before = float(values_of(per_query, f"{key}_before")[members].mean())
            after = float(values_of(per_query, f"{key}_after")[members].mean()) if both else None
            row["values"].append({"key": key, "before": before, "after": after})
        rows.append(row)
    if both:
        rows.sort(key=lambda row: row["values"][-1]["after"] - row["values"][-1]["before"])
    return rows


def _groups(per_query: pd.DataFrame, strips: Sequence[Strip], both: bool) -> list[dict[str, Any]]:
    chosen = choose_queries(per_query, SHOWN_PER_GROUP)
    by_id = {strip.query.id: strip for strip in strips}
    facts = per_query.assign(query_id=per_query["query_id"].astype(str)).set_index("query_id")
    titles = [
        ("Most improved", "Queries whose first correct candidate gained most.", chosen.improved),
        ("Most damaged", "Queries whose first correct candidate lost most.", chosen.damaged),
        (
            "Still missed",
            "Queries that have no correct candidate in first place, before or after.",
            chosen.missed,
        ),
    ]
    groups = []
    for title, meaning, ids in (
        titles if both else [("Missed", "Queries whose first candidate is wrong.", chosen.missed)]
    ):
        shown = [_strip(by_id[name], facts.loc[name], both) for name in ids if name in by_id]
        groups.append({"title": title, "meaning": meaning, "strips": shown})
    return groups


def _strip(strip: Strip, facts: pd.Series, both: bool) -> dict[str, Any]:
    lists = [("Before", strip.before), ("After", strip.after)] if both else [("First candidates", strip.before)]
    return {
        "query": {"id": strip.query.id, "picture": thumbnail(strip.query)},
        "label": str(facts["label"]),
        "hit_before": _rank(facts["first_hit_before"]),
        "hit_after": _rank(facts["first_hit_after"]) if both else None,
        "lists": [
            {
                "name": name,
                "candidates": [
                    {
                        "id": candidate.image.id,
                        "picture": thumbnail(candidate.image),
                        "is_relevant": candidate.is_relevant,
                        "distance": candidate.distance,
                    }
                    for candidate in candidates[:SHOWN_CANDIDATES]
                ],
            }
            for name, candidates in lists
        ],
    }


def _query_rows(per_query: pd.DataFrame, both: bool) -> list[dict[str, Any]]:
    """At most MAX_ROWS queries, those that changed most (first stage alone: the worst), in order of id."""
    ids = per_query["query_id"].astype(str).to_numpy(str)
    before = values_of(per_query, "map@10_before")
    after = values_of(per_query, "map@10_after") if both else before
    change = after - before
    urgency = -np.abs(change) if both else before
    chosen = np.lexsort((ids, urgency))[:MAX_ROWS]
    chosen = chosen[np.argsort(ids[chosen])]
    records = per_query.iloc[chosen].to_dict("records")
    rows = []
    for record, difference in zip(records, change[chosen].tolist(), strict=True):
        row: dict[str, Any] = {
            "id": str(record["query_id"]),
            "label": str(record["label"]),
            "category": "" if _is_missing(record.get("category")) else str(record["category"]),
            "n_relevant": int(record["n_relevant"]),
            "hit_before": _rank(record["first_hit_before"]),
            "map_before": record["map@10_before"],
        }
        if both:
            row |= {
                "hit_after": _rank(record["first_hit_after"]),
                "map_after": record["map@10_after"],
                "change": difference,
                "outcome": "better" if difference > 0 else "worse" if difference < 0 else "equal",
            }
        rows.append(row)
    return rows


def _rank(value: Any) -> int | None:
    return None if _is_missing(value) else int(value)


def _is_missing(value: Any) -> bool:
    return bool(pd.isna(value))
