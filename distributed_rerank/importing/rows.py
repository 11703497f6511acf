"""What every reader of a folder returns: rows of a catalogue, with or without a split of their own."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_rerank.errors import BadInput

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Row:
    """One photo, or one box in a photo."""

    path: Path
    label: str
    split: str = ""
    """train or validation; "" = the reader's files do not say."""
    is_query: bool = True
    is_gallery: bool = True
    category: str | None = None
    sequence: str | None = None
    box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom in pixels."""
    id: str | None = None
    """Where the path is not to be the id."""


Grades = Sequence[tuple[str, str, int]]
"""Id of a query, id of a gallery item, and the grade: 1 relevant, -1 neither relevant nor not."""


@dataclass(frozen=True)
class Judged:
    """The photos of a data set whose answers are listed pair by pair, and these lists by the name of the protocol."""

    rows: list[Row]
    grades: Mapping[str, Grades]


def images_below(folder: Path) -> Iterator[Path]:
    """The image files at any depth, in the order of their paths; hidden files and folders are passed over."""
    for path in _shown(folder):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def others_below(folder: Path) -> Counter[str]:
    """How many files `images_below` leaves out, by the end of their names in lower case, or as `dangling links`."""
    found = (path for path in _shown(folder) if not path.is_dir())
    kinds = (path.suffix.lower() or "without an ending" if path.exists() else "dangling links" for path in found)
    return Counter(kind for kind in kinds if kind not in SUFFIXES)


def _shown(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def first_file(folder: Path, *patterns: str) -> Path | None:
    """The first file, by path, that matches the first of these patterns that any file matches."""
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found[0]
    return None


def needed(folder: Path, what: str, *patterns: str) -> Path:
    """As `first_file`. Raises BadInput where there is none."""
    found = first_file(folder, *patterns)
    if found is None:
        raise BadInput(f"{folder} has no {patterns[0]}, which {what} comes with; extract the whole archive there")
    return found
