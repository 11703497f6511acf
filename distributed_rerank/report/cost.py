"""The report's plots and table of what re-ranking costs, and of what can be saved. Layer 3."""

from collections.abc import Mapping
from typing import Any

from distributed_rerank.report import plots
from distributed_rerank.report.formatting import count_of, metric_name, percent, signed
from distributed_rerank.report.plots import Point

SIGNALS = {
    "gap": "the distance from its first candidate to the second",
    "spread": "the distance from its first candidate to the last that would be re-ranked",
}

Plot = dict[str, Any]


def curve_plots(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> list[Plot]:
    """mAP@10 and CMC@1 by top_n, and mAP@10 by worker-seconds where these were measured."""
    points = metrics.get("curve") or []
    if len(points) < 2:
        return []
    shown = []
    for key in ("map@10", "cmc@1"):
        if all(key in point["metrics"] for point in points):
            places = [Point(point["top_n"], point["metrics"][key], str(point["top_n"])) for point in points]
            name = metric_name(key)
            said = ", ".join(f"{place.y:.3f} at {place.label}" for place in places)
            axis = "re-ranked candidates per query (top_n)"
            picture = plots.curve(
                places,
                metrics["first_stage"][key],
                axis,
                f"{name} against top_n: {said}",
                marked=_knee_of(metrics, key),
            )
            caption = f"{name} by the number of candidates re-ranked.{_knee(metrics, key)}"
            shown.append({"title": f"{name} by top_n", "picture": picture, "caption": caption})
    timed = _by_top_n(timings)
    if timed and all("map@10" in point["metrics"] and point["top_n"] in timed for point in points):
        shown.append(_cost_plot(metrics, timed))
    return shown


def _cost_plot(metrics: Mapping[str, Any], timed: Mapping[int, Mapping[str, Any]]) -> Plot:
    """mAP@10 against worker-seconds for 1,000 queries."""
    places = []
    for point in metrics["curve"]:
        spent = timed[point["top_n"]]["worker_seconds"] / metrics["n_queries"] * 1000
        places.append(Point(max(spent, 1e-6), point["metrics"]["map@10"], f"{spent:.3g}"))
    said = ", ".join(f"{place.y:.3f} at {place.label} s" for place in places)
    picture = plots.curve(
        places, metrics["first_stage"]["map@10"], "worker-seconds for 1,000 queries", f"mAP@10 against cost: {said}"
    )
    last = metrics["curve"][-1]
    caption = (
        f"From the time that an image and a pair took in this run's one pass over {count_of(last['pairs'])} pairs of "
        f"{count_of(last['images'])} images; steps after the pairwise one are not in it."
    )
    return {"title": "mAP@10 by cost", "picture": picture, "caption": caption}


def _knee_of(metrics: Mapping[str, Any], key: str) -> str | None:
    knee = metrics.get("knee") or {}
    return str(knee["top_n"]) if knee.get("metric") == key else None


def _knee(metrics: Mapping[str, Any], key: str) -> str:
    """Which top_n is enough, where metrics.json says so."""
    knee = metrics.get("knee") or {}
    if knee.get("metric") != key:
        return ""
    if knee["top_n"] >= metrics["curve"][-1]["top_n"]:
        return " The knee (ring) is the last point: fewer candidates are worse beyond chance."
    return f" The knee (ring): {knee['top_n']} are enough, more are not better beyond chance."


def cost_rows(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each top_n; a value that was not measured is None."""
    timed = _by_top_n(timings)
    knee = (metrics.get("knee") or {}).get("top_n")
    rows = []
    for point in metrics.get("curve") or []:
        spent = timed.get(point["top_n"], {})
        size = point.get("bytes")
        rows.append(
            {
                "top_n": point["top_n"],
                "is_knee": point["top_n"] == knee,
                "map@10": point["metrics"].get("map@10"),
                "cmc@1": point["metrics"].get("cmc@1"),
                "pairs": point.get("pairs"),
                "images": point.get("images"),
                "gflop": point.get("gflop"),
                "megabytes": None if size is None else size / 1e6,
                "seconds_per_query": spent.get("seconds_per_query"),
                "worker_seconds": spent.get("worker_seconds"),
                "price": spent.get("price_per_1000_queries"),
            }
        )
    return rows


def _by_top_n(timings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    return {point["top_n"]: point for point in timings.get("curve") or []}


def adaptive_part(metrics: Mapping[str, Any]) -> Plot | None:
    """What skipping sure queries saves and loses, as a sentence and a curve; None where it was not measured."""
    found = metrics.get("adaptive")
    if not found:
        return None
    if "skipped" in found:
        return {"sentence": f"Not measured: {found['skipped']}.", "picture": None, "caption": ""}
    change = found["difference"]
    low, high = change["ci95"]
    n_queries = metrics["n_queries"]
    sentence = (
        f"Leaving the {count_of(found['n_skipped'])} of {count_of(n_queries)} queries alone whose first stage looks "
        f"surest saves {count_of(found['pairs_saved'])} of {count_of(found['pairs'])} pairs "
        f"({percent(found['pairs_saved'] / max(1, found['pairs']))}) and changes mAP@10 by {signed(change['mean'])} "
        f"({signed(low)} to {signed(high)}) from {found['reranked']:.3f}."
    )
    signal = found["thresholds"][0]["signal"]
    points = [
        Point(100 * point["share"], point["map@10"], f"{100 * point['share']:g}") for point in found["curve"][signal]
    ]
    said = ", ".join(f"{point.y:.3f} at {point.label} %" for point in points[::5])
    picture = plots.curve(
        points, found["first_stage"], "% of queries not re-ranked, surest first", f"mAP@10 against skipped: {said}",
        is_log=False,
    )  # fmt: skip
    caption = (
        f"How sure a query is: {SIGNALS[signal]}. The threshold of each half of the labels was chosen on the other, "
        f"to keep {percent(found['kept_gain'])} of the pairwise step's gain; steps after it are not in this figure."
    )
    return {"sentence": sentence, "picture": picture, "caption": caption}


def distance_plots(metrics: Mapping[str, Any]) -> list[Plot]:
    """Distances of correct and wrong candidates before and after."""
    shown = []
    for key, name in (("first_stage", "before"), ("reranked", "after")):
        found = (metrics.get("distances") or {}).get(key)
        if not found:
            continue
        relevant, other = sum(found["relevant"]), sum(found["other"])
        said = (
            f"{count_of(relevant)} correct and {count_of(other)} wrong ones among the first "
            f"{found['top_n']} candidates, each as shares of their own number; the two overlap by "
            f"{percent(plots.overlap(found))}."
        )
        title = f"Distances {name}" if metrics["distances"].get("reranked") else "Distances"
        shown.append({"title": title, "picture": plots.distances(found, said), "caption": said})
    return shown
