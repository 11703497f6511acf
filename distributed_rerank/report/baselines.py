"""Baselines in the report: their names, the best one, and whether it beats the trained chain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NAMES = {
    "adapted": "First stage, adapted to train labels",
    "k_reciprocal": "k-reciprocal re-ranking",
    "query_expansion": "Alpha query expansion",
    "database_augmentation": "Database augmentation",
    "both_expansions": "Query expansion and database augmentation",
    "maxsim": "MaxSim of tokens fitted to train labels",
    "external": "Scores of another system",
    "pairwise": "Pairwise step alone",
}


class Best(NamedTuple):
    """The baseline with the largest mAP@10, and whether it is better than the re-ranked order beyond chance."""

    name: str
    figures: Mapping[str, Any]
    beats: bool


def baseline_name(key: str) -> str:
    """`pairwise+k_reciprocal` -> `Pairwise step, then k-reciprocal re-ranking`."""
    before, plus, last = key.rpartition("+")
    name = NAMES.get(last, last)
    return f"Pairwise step, then {name[:1].lower() + name[1:]}" if plus and before else name


def best_without_pairwise(metrics: Mapping[str, Any]) -> Best | None:
    """The best baseline without a pairwise model; None where none was measured. Ties by name."""
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
    """A row for each baseline: first those without a pairwise model, best first, skipped ones at the end of each."""
    seconds = timings.get("baselines") or {}
    rows = []
    for key, entry in (metrics.get("baselines") or {}).items():
        constants = [
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in entry["constants"].items()
        ]
        # +1 sorts what was skipped behind what was measured
        order = ("pairwise" in key, -entry["metrics"]["map@10"] if "metrics" in entry else 1.0)
        row = {"name": baseline_name(key), "constants": ", ".join(constants), "seconds": seconds.get(key)}
        rows.append((order, entry | row))
    return [row for _, row in sorted(rows, key=lambda part: part[0])]
