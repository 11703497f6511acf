"""Data sets whose answers are judged pair by pair: Revisited Oxford and Paris, and tasks of MIEB.

| layout | queries | gallery | rule |
|---|---|---|---|
| roxford | 70, the box of each | 4,993 | easy, medium, hard (Radenovic et al. 2018): see `SETUPS` |
| rparis | 70, the box of each | 6,322 | the same |
| mieb | the task's | the task's corpus | the task's qrels: a score above 0 is relevant |

Nothing is trained on them.
"""

import io
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from distributed_rerank.errors import BadInput
from distributed_rerank.importing.rows import Grades, Judged, Row, images_below, needed

SETUPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
"""Of each protocol: the parts of the ground truth that are relevant, and those that leave the lists."""
_IMAGES_AT_A_TIME = 32
_LANDMARK = re.compile(r"_\d+$")
_SAFE = frozenset(
    {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
        ("__builtin__", "bytes"),
        ("builtins", "bytes"),
    }
)
"""What a file of lists, texts and numbers needs. Any other name in a pickle could run a program."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which lists and numbers do not need")
        return super().find_class(module, name)


def read_revisited(folder: Path, images: Path, name: str) -> Judged:
    """Revisited Oxford or Paris: gnd_roxford5k.pkl or gnd_rparis6k.pkl, and the photos at any depth.

    They stay where they are: nothing is written to `images`.
    """
    file = needed(folder, "Revisited Oxford and Paris", *(f"{depth}gnd_{name}.pkl" for depth in ("", "*/", "*/*/")))
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()  # Python 2 may have written it
        queries, gallery, truth = list(found["qimlist"]), list(found["imlist"]), list(found["gnd"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{file} is not the ground truth of Revisited Oxford and Paris: {error}") from error
    paths = {path.stem: path for path in images_below(folder)}
    absent = [stem for stem in (*queries, *gallery) if stem not in paths]
    if absent:
        raise BadInput(
            f"{folder} lacks {len(absent)} photos of {file.name}, first {absent[0]}.jpg; extract all archives"
        )
    rows = [Row(paths[stem], _landmark(stem), "validation", is_query=False, id=stem) for stem in gallery]
    for stem, own in zip(queries, truth, strict=True):
        left, top, right, bottom = (float(side) for side in own["bbx"])
        box = left, top, right, bottom
        rows.append(Row(paths[stem], _landmark(stem), "validation", is_gallery=False, box=box, id=f"query {stem}"))
    return Judged(rows, {name: list(_grades(queries, gallery, truth, *parts)) for name, parts in SETUPS.items()})


def _landmark(stem: str) -> str:
    return _LANDMARK.sub("", stem)


def _grades(
    queries: Sequence[str], gallery: Sequence[str], truth: Sequence[Any], right: Sequence[str], junk: Sequence[str]
) -> Iterator[tuple[str, str, int]]:
    for stem, own in zip(queries, truth, strict=True):
        for parts, grade in ((right, 1), (junk, -1)):
            for part in parts:
                yield from ((f"query {stem}", gallery[int(place)], grade) for place in own[part])


def read_mieb(folder: Path, images: Path) -> Judged:
    """A task of MIEB from image to image as its Parquet files: corpus/, queries/ (or query/) and qrels/.

    The images are written to the folder `images`. A label is a group of photos that answer each other.
    """
    corpus, queries, qrels = _files(folder, "corpus"), _files(folder, "queries", "query"), _files(folder, "qrels")
    rows = [*_photos(folder, queries, images, "query"), *_photos(folder, corpus, images, "corpus")]
    known = {row.id for row in rows}
    grades = [
        (f"query {pair['query-id']}", f"corpus {pair['corpus-id']}", 1)
        for file in qrels
        for pair in pq.read_table(file, columns=["query-id", "corpus-id", "score"]).to_pylist()
        if pair["score"] > 0
    ]
    lost = next((id for pair in grades for id in pair[:2] if id not in known), None)
    if lost is not None:
        raise BadInput(f"{folder}: the qrels name the {lost}, which is not there; download the whole task")
    groups = _groups(grades)
    return Judged([replace(row, label=groups.get(row.label, row.label)) for row in rows], {"task": grades})


def _files(folder: Path, *names: str) -> list[Path]:
    for name in names:
        files = sorted((folder / name).glob("*.parquet"))
        if files:
            return files
    raise BadInput(f"{folder} has no {names[0]}/*.parquet, which a task of MIEB comes with; download the whole task")


def _photos(folder: Path, files: Sequence[Path], images: Path, part: str) -> Iterator[Row]:
    """A row for each image, with its id as label; the image's bytes are written to a file. Some are held at a time."""
    home, is_query = images / part, part == "query"
    home.mkdir(parents=True, exist_ok=True)
    batches = (batch for file in files for batch in pq.ParquetFile(file).iter_batches(_IMAGES_AT_A_TIME))
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        content = (row.get("image") or {}).get("bytes")
        if content is None:
            raise BadInput(
                f"{folder}: {part} {row['id']} has no image; tasks from image to image alone can be measured here"
            )
        path = home / f"{number:07d}.img"
        path.write_bytes(content)
        id = f"{part} {row['id']}"
        yield Row(path, id, "validation", is_query, not is_query, id=id)


def _groups(grades: Grades) -> dict[str, str]:
    """Of each id in a pair, the least id that pairs join it to."""
    leader: dict[str, str] = {}

    def find(id: str) -> str:
        while leader.setdefault(id, id) != id:
            leader[id] = leader[leader[id]]
            id = leader[id]
        return id

    for query, item, _ in grades:
        first, second = sorted((find(query), find(item)))
        leader[second] = first
    return {id: find(id) for id in leader}
