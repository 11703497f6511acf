"""The report's plots and table of what re-ranking costs, and of what can be saved."""

from collections.abc import Mapping
from typing import Any

from distributed_rerank.report import plots
from distributed_rerank.report.formatting import count_of, interval, metric_name, percent, signed
from distributed_rerank.report.plots import Point

STEPS = {
    "adapt": "First stage, adapted to train labels",
    "pairwise": "Pairwise model",
    "neighbourhood": "Neighbourhoods",
    "k_reciprocal": "k-reciprocal neighbours",
    "query_expansion": "Query expansion",
    "alpha_qe": "Alpha query expansion",
}
SECONDS = {"adapt": "adapt", "pairwise": "score"}
"""The part of an evaluation that computes a chain step; `rank` computes those that look at neighbours."""
SIGNALS = {
    "gap": "the distance from its first candidate to the second",
    "spread": "the distance from its first candidate to the last that would be re-ranked",
}

Plot = dict[str, Any]


def curve_plots(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> list[Plot]:
    """mAP@10 and CMC@1 by top_n, and mAP@10 by worker-seconds where these were measured."""
    curve = metrics.get("curve") or []
    if len(curve) < 2:
        return []
    shown = [_curve_plot(metrics, key) for key in ("map@10", "cmc@1") if key in metrics["first_stage"]]
    timed = _by_top_n(timings)
    if all(point["top_n"] in timed for point in curve):
        shown.append(_cost_plot(metrics, timed))
    return shown


def _curve_plot(metrics: Mapping[str, Any], key: str) -> Plot:
    """One metric against top_n."""
    name, knee = metric_name(key), metrics.get("knee") or {}
    points = [Point(point["top_n"], point["metrics"][key], str(point["top_n"])) for point in metrics["curve"]]
    marked, knee_text = None, ""
    if knee.get("metric") == key:
        marked = str(knee["top_n"])
        knee_text = f" The knee (ring): {marked} are enough, more are not better beyond chance."
        if knee["top_n"] >= metrics["curve"][-1]["top_n"]:
            knee_text = " The knee (ring) is the last point: fewer candidates are worse beyond chance."
    description = f"{name} against top_n: {_values_in_text(points)}"
    axis = "re-ranked candidates per query (top_n)"
    picture = plots.curve(points, metrics["first_stage"][key], axis, description, marked=marked)
    caption = f"{name} by the number of candidates re-ranked.{knee_text}"
    return {"title": f"{name} by top_n", "picture": picture, "caption": caption}


def _cost_plot(metrics: Mapping[str, Any], timed: Mapping[int, Mapping[str, Any]]) -> Plot:
    """mAP@10 against worker-seconds for 1,000 queries."""
    points = []
    for point in metrics["curve"]:
        seconds = timed[point["top_n"]]["worker_seconds"] / metrics["n_queries"] * 1000
        points.append(Point(max(seconds, 1e-6), point["metrics"]["map@10"], f"{seconds:.3g}"))
    description = f"mAP@10 against cost: {_values_in_text(points, ' s')}"
    picture = plots.curve(points, metrics["first_stage"]["map@10"], "worker-seconds for 1,000 queries", description)
    last = metrics["curve"][-1]
    caption = (
        f"Computed from the time per image and per pair in this run's one pass over {count_of(last['pairs'])} pairs of "
        f"{count_of(last['images'])} images; chain steps after the pairwise one are not included."
    )
    return {"title": "mAP@10 by cost", "picture": picture, "caption": caption}


def _values_in_text(points: list[Point], unit: str = "") -> str:
    return ", ".join(f"{point.y:.3f} at {point.label}{unit}" for point in points)


def cost_rows(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each top_n, none where no pair was scored; a value that was not measured is None."""
    timed = _by_top_n(timings)
    knee = (metrics.get("knee") or {}).get("top_n")
    rows = []
    for point in metrics.get("curve") or []:
        row = dict.fromkeys(("cmc@1", "pairs", "images", "gflop", "bytes", "worker_seconds", "seconds_per_query"))
        row |= {"price_per_1000_queries": None, "is_knee": point["top_n"] == knee}
        rows.append(row | point | point["metrics"] | timed.get(point["top_n"], {}))
    return rows if any(row["pairs"] for row in rows) else []


def _by_top_n(timings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    return {point["top_n"]: point for point in timings.get("curve") or []}


def step_rows(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each chain step: its name in words, its figures and its seconds (None = not measured)."""
    rows = []
    for entry in metrics.get("steps") or []:
        names: list[str] = [STEPS.get(name) or name for name in entry["step"].split(" and ")]
        rows.append(entry | {"name": ", ".join(names), "seconds": timings.get(SECONDS.get(entry["step"], "rank"))})
    return rows


def adaptive_part(metrics: Mapping[str, Any]) -> Plot | None:
    """What skipping sure queries saves and loses, as a sentence and a curve; None where it was not measured."""
    adaptive = metrics.get("adaptive")
    if not adaptive:
        return None
    if "skipped" in adaptive:
        return {"sentence": f"Not measured: {adaptive['skipped']}.", "picture": None, "caption": ""}
    change, n_pairs, n_saved = adaptive["difference"], adaptive["pairs"], adaptive["pairs_saved"]
    sentence = (
        f"The first stage looks sure for {count_of(adaptive['n_skipped'])} of {count_of(metrics['n_queries'])} "
        f"queries. Not re-ranking them saves {count_of(n_saved)} of {count_of(n_pairs)} pairs "
        f"({percent(n_saved / max(1, n_pairs))}) and changes mAP@10 by {signed(change['mean'])} ({interval(change)}) "
        f"from {adaptive['reranked']:.3f}."
    )
    signal = adaptive["thresholds"][0]["signal"]
    points = [
        Point(100 * point["share"], point["map@10"], f"{100 * point['share']:g}") for point in adaptive["curve"][signal]
    ]
    axis = "% of queries not re-ranked, surest first"
    description = f"mAP@10 against skipped: {_values_in_text(points[::5], ' %')}"
    picture = plots.curve(points, adaptive["first_stage"], axis, description, is_log=False)
    caption = (
        f"How sure a query is: {SIGNALS[signal]}. The threshold of each half of the labels was chosen on the other "
        f"half, to keep {percent(adaptive['kept_gain'])} of the pairwise step's gain. Chain steps after it are not in "
        "this figure."
    )
    return {"sentence": sentence, "picture": picture, "caption": caption}


def distance_plots(metrics: Mapping[str, Any]) -> list[Plot]:
    """Distances of correct and wrong candidates before and after."""
    shown = []
    measured = metrics.get("distances") or {}
    for key, name in (("first_stage", "before"), ("reranked", "after")):
        histograms = measured.get(key)
        if not histograms:
            continue
        n_correct, n_wrong = (count_of(sum(histograms[kind])) for kind in ("relevant", "other"))
        caption = (
            f"{n_correct} correct and {n_wrong} wrong ones among the first {histograms['top_n']} candidates, each as "
            f"shares of their own number; the two overlap by {percent(plots.overlap(histograms))}."
        )
        title = f"Distances {name}" if measured.get("reranked") else "Distances"
        shown.append({"title": title, "picture": plots.distances(histograms, caption), "caption": caption})
    return shown
