"""How figures are written: names of metrics, numbers, intervals."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

MINUS = "−"
METRIC_NAMES = {"cmc": "CMC", "precision": "Precision", "recall": "Recall", "map": "mAP", "mrr": "MRR"}
"""As the literature writes them, in the order of a table."""


def metric_name(key: str) -> str:
    """`map@10` -> `mAP@10`, as the literature writes it."""
    stem, at, cutoff = key.partition("@")
    return METRIC_NAMES.get(stem, stem) + at + cutoff.upper()


def in_table_order(keys: Iterable[str]) -> list[str]:
    """Metrics as a table lists them, also where they come from a JSON file in the order of letters: CMC@5, CMC@10."""
    stems = list(METRIC_NAMES)

    def place(key: str) -> tuple[int, bool, int, str]:
        stem, _, cutoff = key.partition("@")
        has_number = cutoff.isdecimal()
        return stems.index(stem) if stem in stems else len(stems), not has_number, int(cutoff) if has_number else 0, key

    return sorted(keys, key=place)


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
