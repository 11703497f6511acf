"""How the report says things: names of metrics, numbers, and the verdict in one sentence. Layer 3."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed_rerank.report.baselines import Best, baseline_name, best_without_training

MINUS = "−"


class Verdict(NamedTuple):
    """`tone` is good, bad, open (undecided) or plain (nothing compared); `detail` is what else to know."""

    tone: str
    sentence: str
    detail: str


def verdict(metrics: Mapping[str, Any], both: bool) -> Verdict:
    """Whether re-ranking helped, judged by mAP@10 and its 95 % interval, and what is left to gain.

    A baseline without training that is better beyond chance comes first.
    """
    first, best = metrics["first_stage"], best_without_training(metrics)
    if not both:
        sentence = f"First stage alone: mAP@10 is {fraction(first['map@10'])}{_and_cmc(first)}."
        detail = "No pairwise model was applied."
        return Verdict("plain", sentence, f"{detail} {_best_so_far(best)}" if best else detail)
    before, after = first["map@10"], metrics["reranked"]["map@10"]
    compared = (metrics.get("difference") or {}).get("map@10") or {}
    low, high = compared.get("ci95") or (None, None)
    change = compared.get("mean", after - before)
    moved = f"mAP@10 {_verb(change)} {fraction(before)} to {fraction(after)} ({signed(change)}"
    interval = f"; 95 % interval {signed(low)} to {signed(high)})" if low is not None else ")"
    if low is not None and low > 0:
        tone, claim = "good", "Re-ranking helps"
    elif high is not None and high < 0:
        tone, claim = "bad", "Re-ranking makes the order worse"
    elif low is not None:
        tone, claim = "open", "Re-ranking makes no difference that these queries can show"
    else:
        tone, claim = "open", "Re-ranked, without a test of significance"
    detail = _detail(metrics, before, after)
    if best is not None and best.beats:
        return Verdict("bad", _beaten(best, after), f"{claim}: {moved}{interval}. {detail}")
    return Verdict(tone, f"{claim}: {moved}{interval}.", f"{detail} {_best_so_far(best)}" if best else detail)


def _beaten(best: Best, after: float) -> str:
    against = best.figures["against_reranked"]["map@10"]
    name, value = baseline_name(best.name), fraction(best.figures["metrics"]["map@10"])
    interval = f"95 % interval {signed(against['ci95'][0])} to {signed(against['ci95'][1])}"
    return (
        f"{name}, which needs no training, is better than this chain: mAP@10 {value} against {fraction(after)} "
        f"({signed(against['mean'])}; {interval})."
    )


def _best_so_far(best: Best) -> str:
    change = best.figures["difference"]["map@10"]
    value = fraction(best.figures["metrics"]["map@10"])
    said = "Best without training" if change["mean"] > 0 else "Nothing is gained without training; at best"
    return (
        f"{said}: {baseline_name(best.name)}, mAP@10 {value} ({signed(change['mean'])}; "
        f"{signed(change['ci95'][0])} to {signed(change['ci95'][1])})."
    )


def _verb(change: float) -> str:
    return "rises from" if change > 0 else "falls from" if change < 0 else "stays, from"


def _and_cmc(first: Mapping[str, float]) -> str:
    return f", CMC@1 {fraction(first['cmc@1'])}" if "cmc@1" in first else ""


def _detail(metrics: Mapping[str, Any], before: float, after: float) -> str:
    parts = []
    if "cmc@1" in metrics["first_stage"] and "cmc@1" in metrics["reranked"]:
        first, last = metrics["first_stage"]["cmc@1"], metrics["reranked"]["cmc@1"]
        parts.append(f"CMC@1 goes from {fraction(first)} to {fraction(last)}.")
    ceiling = (metrics.get("oracle") or {}).get("map@10")
    if ceiling is not None:
        said = f"A perfect re-ranker of the same candidates would reach mAP@10 {fraction(ceiling)}"
        if after > before and ceiling > before:
            said += f"; {percent((after - before) / (ceiling - before))} of that headroom is captured"
        parts.append(said + ".")
    return " ".join(parts)


def metric_name(key: str) -> str:
    """`map@10` -> `mAP@10`, as the literature spells it."""
    stem, at, cutoff = key.partition("@")
    known = {"cmc": "CMC", "map": "mAP", "mrr": "MRR", "precision": "Precision", "recall": "Recall"}
    return known.get(stem, stem) + at + cutoff.upper() if cutoff == "r" else known.get(stem, stem) + at + cutoff


def fraction(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Three decimals with the sign written out; what rounds to zero has none."""
    if value is None:
        return "–"
    size = f"{abs(value):.3f}"
    return size if float(size) == 0 else ("+" if value > 0 else MINUS) + size


def p_value(value: float | None) -> str:
    """Three decimals, or `< 0.001`."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count_of(value: int | None) -> str:
    """With thousands separators."""
    return "–" if value is None else f"{value:,}"


def percent(share: float) -> str:
    """A share as whole per cent."""
    return f"{100 * share:.0f} %"


def short(value: float | None) -> str:
    """Three significant digits, with thousands separators and no exponent."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = min(8, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text), in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(str(part) for part in value)))
        else:
            rows.append((name, f"{value:g}" if isinstance(value, float) else str(value)))
    return rows
