"""Builds the report: metrics and values of each query in, one HTML file out.

Every figure on the page is in metrics.json or per_query.parquet, or is a difference, share or count of such figures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from distributed_rerank.approximate import search_in_words
from distributed_rerank.content_policy import with_policy
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.report import plots
from distributed_rerank.report.baselines import baseline_rows
from distributed_rerank.report.cost import adaptive_part, cost_rows, curve_plots, distance_plots, step_rows
from distributed_rerank.report.formatting import (
    count_of,
    flatten,
    fraction,
    in_table_order,
    interval,
    metric_name,
    same_bytes_in_words,
    short,
    signed,
)
from distributed_rerank.report.query_examples import (
    SHOWN_CANDIDATES,
    SHOWN_PER_GROUP,
    Strip,
    choose_queries,
    file_link,
    thumbnail,
    values_of,
)
from distributed_rerank.report.verdict import ship_or_wait_in_words, verdict
from distributed_rerank.report.why import drawn

MAX_ROWS = 2000
MAX_LABELS = 500
VERSIONS = ("distributed_rerank", "python", "torch", "timm")
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
    places: pd.DataFrame | None = None,
) -> Path:
    """Write the report to the file `out` and return it.

    `metrics`, `per_query` and `timings` are the content of metrics.json, per_query.parquet and timings.json. The report
    shows the `strips` of the queries that `choose_queries(per_query)` names, in its order, the images of `suspects`,
    the first pairs of `metrics["suspects"]`, and `places`, the map of the embeddings. Images are read here and embedded
    as thumbnails. The same arguments give the same bytes. Without `metrics["reranked"]` the report is about the first
    stage alone.
    """
    timings = timings or {}
    both = bool(metrics.get("reranked"))
    page = {
        "metrics": metrics,
        "both": both,
        "same_bytes": same_bytes_in_words(metrics),
        "verdict": verdict(metrics),
        "oml": metrics.get("oml"),
        "plots": curve_plots(metrics, timings) if both else [],
        "costs": cost_rows(metrics, timings),
        "steps": step_rows(metrics, timings),
        "baselines": baseline_rows(metrics, timings),
        "adaptive": adaptive_part(metrics),
        "distances": [*([_rank_changes(per_query)] if both else []), *distance_plots(metrics)],
        "map": None if places is None else _map(places),
        "suspects": list(zip(metrics["suspects"], suspects, strict=False)) if suspects else [],
        "ship_or_wait": ship_or_wait_in_words(metrics),
        "categories": _categories(metrics, both),
        "things": {"against_best_photo": None, **metrics["items"]} if "items" in metrics else None,
        "thresholds": [row for row in metrics.get("thresholds") or [] if row["n_accepted"]],
        "labels": _label_rows(per_query, both),
        "n_labels": per_query["label"].nunique(),
        "header": header_rows(config, environment) + _search_rows(metrics),
        "groups": _groups(per_query, strips, both),
        "queries": _query_rows(per_query, both),
        "n_candidates": SHOWN_CANDIDATES,
        "n_measured": len(per_query),
        "rejects": [] if rejects is None else rejects.head(MAX_REJECTS).astype(str).to_dict("records"),
        "n_rejects_listed": 0 if rejects is None else len(rejects),
        "cost": flatten(metrics.get("cost") or {}),
        "config": flatten(config),
        "environment": flatten(environment),
    }
    out.write_text(with_policy(_template().render(page)) + "\n", encoding="utf-8", newline="\n")
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
        "interval": interval,
        "signed": signed,
        "count": count_of,
        "metric": metric_name,
        "in_table_order": in_table_order,
        "short": short,
        "thumbnail": thumbnail,
        "file_link": file_link,
        "drawn": drawn,
    }
    return environment.get_template(TEMPLATE)


def _rank_changes(per_query: pd.DataFrame) -> dict[str, Any]:
    """A plot of how far the first correct candidates moved."""
    counts = plots.rank_changes(per_query)
    description = ", ".join(f"{name}: {count}" for name, count in counts)
    same = dict(counts)["same"]
    caption = (
        f"Queries by how many places their first correct candidate moved. For {count_of(same)} of "
        f"{count_of(len(per_query))} it did not move (not drawn). Lost, found: it left or entered the list."
    )
    picture = plots.histogram(counts, f"Queries by rank change of the first correct candidate: {description}")
    return {"title": "Rank changes", "picture": picture, "caption": caption}


def _map(places: pd.DataFrame) -> dict[str, str]:
    n_missed = int(np.count_nonzero(~places["is_right"].to_numpy()))
    what = f"{count_of(len(places))} queries of {count_of(len(places['label'].unique()))} labels"
    caption = (
        f"{what}, near each other where their embeddings are, as far as a plane can show it: along the two directions "
        f"in which labels differ most. {count_of(n_missed)} have something else in the first place; where they lie "
        "among others, two labels look alike to the extractor. Point at a dot for its label and id."
    )
    picture = plots.scatter(places, f"Map of {what}; {n_missed} have something else in the first place")
    return {"title": "Map of the queries", "picture": picture, "caption": caption}


def _categories(metrics: Mapping[str, Any], both: bool) -> list[dict[str, Any]]:
    """Means within each category, the largest loss of mAP@10 first; ties by name."""
    rows = []
    for name, means in sorted((metrics.get("categories") or {}).items()):
        values = [
            {"key": key, "before": means["first_stage"][key], "after": means["reranked"][key] if both else None}
            for key in ("cmc@1", "map@10")
            if key in means["first_stage"]
        ]
        compared = means["difference"]["map@10"] if both else None
        rows.append({"name": name or "(none)", "n_queries": means["n_queries"], "values": values, "compared": compared})
    return sorted(rows, key=lambda row: row["compared"]["mean"]) if both else rows


def _label_rows(per_query: pd.DataFrame, both: bool) -> list[dict[str, Any]]:
    """Means of each label's queries, at most `MAX_LABELS`: those that lost most first, or the worst; ties by name."""
    columns = {"n_queries": ("query_id", "size"), "cmc_before": ("first_hit_before", _share_of_firsts)}
    columns["map_before"] = ("map@10_before", "mean")
    if both:
        columns |= {"cmc_after": ("first_hit_after", _share_of_firsts), "map_after": ("map@10_after", "mean")}
    table = per_query.groupby("label", sort=True).agg(**columns).reset_index()
    order = table["map_after"] - table["map_before"] if both else table["map_before"]
    return _records(table.assign(change=order).sort_values("change", kind="stable").head(MAX_LABELS))


def _share_of_firsts(ranks: pd.Series) -> float:
    return float(ranks.eq(1).fillna(False).mean())


def header_rows(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the report is about: when, which catalogue and chain, made by which command and versions."""
    rows = [(name, environment.get(name)) for name in ("date", "command")]
    rows[1:1] = [(name, config.get(name)) for name in ("catalogue", "model", "chain")]
    versions = ", ".join(f"{name} {environment[name]}" for name in VERSIONS if environment.get(name))
    return [(name, str(value)) for name, value in [*rows, ("versions", versions)] if value]


def _search_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each approximate search looks at and finds."""
    names = {"candidates": "search", "adapted_candidates": "search, adapted embeddings"}
    return [
        (names.get(name, "search, lists of all images"), search_in_words(figures))
        for name, figures in metrics.get("search", {}).items()
    ]


def _groups(per_query: pd.DataFrame, strips: Sequence[Strip], both: bool) -> list[dict[str, Any]]:
    """The groups of queries that are shown with images; each strip comes with its query's row of the table."""
    chosen = choose_queries(per_query, SHOWN_PER_GROUP)
    by_id = {strip.query.id: strip for strip in strips}
    is_shown = per_query["query_id"].isin([id for group in chosen for id in group])
    facts = {row["query_id"]: row for row in _records(per_query.loc[is_shown])}
    groups = [("Missed", "Queries whose first candidate is wrong.", chosen.missed)]
    if both:
        groups = [
            ("Most improved", "Queries whose first correct candidate gained most.", chosen.improved),
            ("Most damaged", "Queries whose first correct candidate lost most.", chosen.damaged),
            ("Still missed", "Queries without a correct candidate in first place, before or after.", chosen.missed),
        ]
    return [
        {"title": title, "meaning": meaning, "strips": [(by_id[id], facts[id]) for id in ids if id in by_id]}
        for title, meaning, ids in groups
    ]


def _query_rows(per_query: pd.DataFrame, both: bool) -> list[dict[str, Any]]:
    """At most `MAX_ROWS` queries in order of id: those that changed most, or the worst of the first stage alone."""
    ids = per_query["query_id"].to_numpy(str)
    before = values_of(per_query, "map@10_before")
    change = values_of(per_query, "map@10_after") - before if both else np.zeros_like(before)
    chosen = np.lexsort((ids, -np.abs(change) if both else before))[:MAX_ROWS]
    chosen = chosen[np.argsort(ids[chosen])]
    return _records(per_query.iloc[chosen].assign(change=change[chosen]))


def _records(per_query: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries, None where a value is missing."""
    cells = per_query.astype(object)
    return cells.where(cells.notna(), None).to_dict("records")
