"""How figures are put into words: names of metrics, numbers, and the verdict in one sentence."""

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


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Whether re-ranking helped, by mAP@10 and its 95 % interval, and how much more was possible.

    A baseline without training that is better beyond chance comes first.
    """
    first, best = metrics["first_stage"], best_without_training(metrics)
    best_text = "" if best is None else f" {_best_text(best)}"
    if not metrics.get("reranked"):
        cmc = f", CMC@1 {fraction(first['cmc@1'])}" if "cmc@1" in first else ""
        sentence = f"First stage alone: mAP@10 is {fraction(first['map@10'])}{cmc}."
        return Verdict("plain", sentence, f"No pairwise model was applied.{best_text}")
    before, after = first["map@10"], metrics["reranked"]["map@10"]
    compared = metrics["difference"]["map@10"]
    low, high = compared["ci95"]
    if low > 0:
        tone, claim = "good", "Re-ranking helps"
    elif high < 0:
        tone, claim = "bad", "Re-ranking makes the order worse"
    else:
        tone, claim = "open", "Re-ranking makes no difference that these queries can show"
    change = compared["mean"]
    moved = f"{'rises' if change > 0 else 'falls'} from {fraction(before)} to {fraction(after)}"
    moved = moved if change else f"stays at {fraction(after)}"
    sentence = f"{claim}: mAP@10 {moved} ({signed(change)}; 95 % interval {interval(compared)})."
    detail = _detail(metrics, before, after)
    if best is not None and best.beats:
        return Verdict("bad", _beaten(best, after), f"{sentence} {detail}")
    return Verdict(tone, sentence, f"{detail}{best_text}")


def _beaten(best: Best, after: float) -> str:
    against = best.figures["against_reranked"]["map@10"]
    name, value = baseline_name(best.name), fraction(best.figures["metrics"]["map@10"])
    return (
        f"{name}, which needs no training, is better than this chain: mAP@10 {value} against {fraction(after)} "
        f"({signed(against['mean'])}; 95 % interval {interval(against)})."
    )


def _best_text(best: Best) -> str:
    change = best.figures["difference"]["map@10"]
    value = fraction(best.figures["metrics"]["map@10"])
    claim = "Best without training" if change["mean"] > 0 else "Nothing is gained without training; at best"
    return f"{claim}: {baseline_name(best.name)}, mAP@10 {value} ({signed(change['mean'])}; {interval(change)})."


def _detail(metrics: Mapping[str, Any], before: float, after: float) -> str:
    """What CMC@1 did, and what a perfect re-ranker would have reached."""
    ceiling = metrics["oracle"]["map@10"]
    detail = f"A perfect re-ranker of the same candidates would reach mAP@10 {fraction(ceiling)}"
    if ceiling > before and after > before:
        detail += f"; {percent((after - before) / (ceiling - before))} of that headroom is captured"
    if "cmc@1" in metrics["first_stage"]:
        first, last = metrics["first_stage"]["cmc@1"], metrics["reranked"]["cmc@1"]
        detail = f"CMC@1 goes from {fraction(first)} to {fraction(last)}. {detail}"
    return f"{detail}."


def metric_name(key: str) -> str:
    """`map@10` -> `mAP@10`, as the literature writes it."""
    stem, at, cutoff = key.partition("@")
    names = {"cmc": "CMC", "map": "mAP", "mrr": "MRR", "precision": "Precision", "recall": "Recall"}
    return names.get(stem, stem) + at + cutoff.upper()


def fraction(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Three decimals with a sign; a value that rounds to zero has none."""
    if value is None:
        return "–"
    size = f"{abs(value):.3f}"
    return size if float(size) == 0 else ("+" if value > 0 else MINUS) + size


def interval(compared: Mapping[str, Any]) -> str:
    """The 95 % interval of a difference: `+0.010 to +0.030`."""
    return " to ".join(signed(end) for end in compared["ci95"])


def p_value(value: float | None) -> str:
    """Three decimals, or `< 0.001`."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count_of(value: int | None) -> str:
    """A count with thousands separators."""
    return "–" if value is None else f"{value:,}"


def percent(share: float) -> str:
    """A share in whole per cent."""
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


def same_bytes_in_words(metrics: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Number and kind of the images that are there twice, without kinds of which there are none."""
    words = {
        "queries_in_gallery": "queries with the same file in the gallery",
        "queries_under_two_labels": "queries with the same file under another label",
        "measured_in_train": "measured images with the same file in train",
        "not_compared": "images not compared byte by byte",
    }
    found = metrics.get("same_bytes", {})
    return [(found[name], text) for name, text in words.items() if found.get(name)]
