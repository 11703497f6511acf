"""Rankings and judgements as TREC files, which every information retrieval tool reads.

A run's line is `query Q0 item rank score tag`, a judgement's (qrels) `query 0 item 1`; fields are separated by a space.
An id with white space or a percent sign has these percent-encoded, in both kinds of file alike; other ids stay as they
are. The tag of a run says that it was written so, and `read_candidates` then decodes the ids.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from distributed_rerank.storage.files import atomic_path

OWN_TAG = "distributed_rerank:"
"""How the tags of our runs begin."""
_UNSAFE = re.compile(r"[\s%]")


def write_trec_run(path: str | Path, batches: Iterable[pa.Table], tag: str) -> None:
    """Write candidates tables (sorted by query and rank) as a TREC run; scores as `trec_scores` makes them.

    The run's tag is OWN_TAG and then `tag`.
    A query's rows are all in one batch. The tables' ranks are kept as they are. The file appears complete or not at
    all.
    """
    _write_lines(path, (line for batch in batches for line in _run_lines(batch, tag)))


def _run_lines(candidates: pa.Table, tag: str) -> Iterator[str]:
    names = candidates["query_id"].to_numpy()
    is_first = np.ones(len(names), bool)
    is_first[1:] = names[1:] != names[:-1]
    scores = trec_scores(candidates["distance"].to_numpy().astype(np.float32), np.flatnonzero(is_first))
    queries, items = (_safe(candidates[name].to_pylist()) for name in ("query_id", "gallery_id"))
    cells = zip(queries, items, candidates["rank"].to_pylist(), scores, strict=True)
    return (f"{query} Q0 {item} {rank} {score} {OWN_TAG}{tag}" for query, item, rank, score in cells)


def trec_scores(distances: Float32[np.ndarray, " row"], starts: np.ndarray) -> list[str]:
    """Scores -distance of lists that begin at `starts`, each list strictly decreasing, as the shortest exact float32.

    Evaluation tools sort by score and order ties in ways of their own. A score that would not be below its predecessor
    therefore becomes the next smaller float32; -distance is exact wherever there is no tie. float32, because trec_eval
    reads scores in that precision.
    """
    keys = _ordered_integers(-distances)
    lengths = np.diff(np.append(starts, len(keys)))
    place = np.arange(len(keys)) - np.repeat(starts, lengths)
    keys += place
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        np.minimum.accumulate(keys[start : start + length], out=keys[start : start + length])
    return [str(score) for score in _floats_of(keys - place)]


def write_qrels(path: str | Path, judgements: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Write what is relevant to each query, (query id, gallery ids), in the order given, as TREC qrels of grade 1."""
    _write_lines(
        path,
        (f"{query} 0 {item} 1" for name, relevant in judgements for query in _safe([name]) for item in _safe(relevant)),
    )


def _ordered_integers(values: Float32[np.ndarray, " row"]) -> np.ndarray:
    """int64 in the order of the float32 values; neighbouring floats have neighbouring integers, -0 and 0 the same."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _floats_of(keys: np.ndarray) -> Float32[np.ndarray, " row"]:
    bits = np.where(keys < 0, np.abs(keys) | 0x80000000, keys)
    return bits.astype(np.uint32).view(np.float32)


def _safe(ids: Sequence[str]) -> list[str]:
    return [_UNSAFE.sub(lambda found: quote(found.group(), safe=""), id) for id in ids]


def _write_lines(path: str | Path, lines: Iterable[str]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
