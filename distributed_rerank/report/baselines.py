"""What the report says about baselines: their names, the best one, and whether it beats the trained chain. Layer 3."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NAMES = {
    "k_reciprocal": "k-reciprocal re-ranking",
    "query_expansion": "Alpha query expansion",
    "database_augmentation": "Database augmentation",
    "both_expansions": "Query expansion and database augmentation",
    "maxsim": "MaxSim of cached tokens",
    "pairwise": "Pairwise step alone",
}


class Best(NamedTuple):
    """The baseline of largest mAP@10, and whether it is better than the re-ranked order beyond chance."""

    name: str
    figures: Mapping[str, Any]
    beats: bool


def baseline_name(key: str) -> str:
    """`pairwise+k_reciprocal` -> `Pairwise step, then k-reciprocal re-ranking`."""
    before, plus, last = key.rpartition("+")
    name = NAMES.get(last, last)
    return f"Pairwise step, then {name[:1].lower() + name[1:]}" if plus and before else name


def best_without_training(metrics: Mapping[str, Any]) -> Best | None:
    """The best of those that use no pairwise model; None where none was measured. Ties by name."""
    measured = [
        (entry["metrics"]["map@10"], name, entry)
        for name, entry in (metrics.get("baselines") or {}).items()
        if "metrics" in entry and "pairwise" not in name
    ]
    if not measured:
        return None
    _, name, entry = min(measured, key=lambda part: (-part[0], part[1]))
    against = (entry.get("against_reranked") or {}).get("map@10")
    return Best(name, entry, against is not None and against["ci95"][0] > 0)


def baseline_rows(metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each baseline, those without a pairwise model first, the better ones first; the skipped ones last."""
    seconds = timings.get("baselines") or {}
    rows = []
    for key, entry in (metrics.get("baselines") or {}).items():
        row: dict[str, Any] = {
            "name": baseline_name(key),
            "needs_training": "pairwise" in key,
            "constants": ", ".join(f"{name}={_number(value)}" for name, value in entry["constants"].items()),
            "skipped": entry.get("skipped"),
            "map@10": None,
        }
        if "metrics" in entry:
            row |= {
                "cmc@1": entry["metrics"].get("cmc@1"),
                "map@10": entry["metrics"]["map@10"],
                "difference": entry["difference"]["map@10"],
                "against": (entry.get("against_reranked") or {}).get("map@10"),
                "seconds": seconds.get(key),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["needs_training"], row["map@10"] is None, -(row["map@10"] or 0)))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
