"""Candidate lists and pair distances between their files (ids) and their arrays (item numbers) (layer 2)."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float32, Int64

from distributed_rerank.data import locations, tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput

_TREC_COLUMNS = ["query_id", "q0", "gallery_id", "rank", "score", "tag"]


class CandidateLists(NamedTuple):
    """Candidates of each query, best first, as items of one catalogue; shorter lists end in -1 and inf."""

    query_items: Int64[np.ndarray, " query"]
    items: Int64[np.ndarray, "query k"]
    distances: Float32[np.ndarray, "query k"]


def candidates_table(lists: CandidateLists, ids: np.ndarray) -> pa.Table:
    """The candidates table of these lists, in their order; `ids` are the catalogue's. Ranks count from 1."""
    filled = lists.items >= 0
    assert not (filled[:, 1:] & ~filled[:, :-1]).any(), "a candidate list has a gap"
    rows, columns = np.nonzero(filled)
    names = pa.array(ids, pa.string())
    return pa.table(
        {
            "query_id": names.take(pa.array(lists.query_items[rows])),
            "gallery_id": names.take(pa.array(lists.items[filled])),
            "rank": pa.array(columns + 1, pa.int32()),
            "distance": pa.array(lists.distances[filled], pa.float32()),
        }
    )


def candidate_lists(table: pa.Table, catalogue: Catalogue) -> CandidateLists:
    """The lists of a candidates table, queries in item order, each list in the order of its ranks.

    Raises BadInput naming ids that the catalogue does not have.
    """
    queries = catalogue.items_of(table["query_id"].to_numpy())
    gallery = catalogue.items_of(table["gallery_id"].to_numpy())
    order = np.lexsort((table["rank"].to_numpy(), queries))
    query_items, starts, counts = np.unique(queries[order], return_index=True, return_counts=True)
    shape = (len(query_items), int(counts.max(initial=0)))
    items, distances = np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
    row = np.repeat(np.arange(len(query_items)), counts)
    column = np.arange(len(order)) - np.repeat(starts, counts)
    items[row, column] = gallery[order]
    distances[row, column] = table["distance"].to_numpy()[order]
    return CandidateLists(query_items.astype(np.int64), items, distances)


def pairs_table(query_ids: np.ndarray, gallery_ids: np.ndarray, logits: np.ndarray) -> pa.Table:
    """The pair distances table of scored pairs, in the order given."""
    columns = {"query_id": query_ids, "gallery_id": gallery_ids, "logit": np.asarray(logits, np.float32)}
    return tables.conform(pa.table(columns), "pair_distances")


def aligned_logits(pairs: pa.Table, catalogue: Catalogue, lists: CandidateLists) -> Float32[np.ndarray, "query k"]:
    """Logits of a pair distances table at the places of `lists`; NaN where a pair was not scored.

    Pairs that are in no list are left out. Raises BadInput for a pair with two logits and for unknown ids.
    """
    n = len(catalogue)
    keys = catalogue.items_of(pairs["query_id"].to_numpy()) * n + catalogue.items_of(pairs["gallery_id"].to_numpy())
    order = np.argsort(keys, kind="stable")
    keys, logits = keys[order], pairs["logit"].to_numpy()[order]
    if len(keys) and (keys[1:] == keys[:-1]).any():
        raise BadInput("a pair has two logits; give each (query_id, gallery_id) once")
    wanted = lists.query_items[:, None] * n + lists.items
    place = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
    found = (lists.items >= 0) & (keys[place] == wanted) if len(keys) else np.zeros(wanted.shape, bool)
    result = np.full(wanted.shape, np.nan, np.float32)
    result[found] = logits[place[found]]
    return result


def read_candidates(path: str | Path, schemes: frozenset[str] = locations.SCHEMES) -> pa.Table:
    """A candidates table from Parquet (file or folder), CSV or a TREC run, sorted by query id and rank.

    Parquet and CSV: `query_id, gallery_id` and `distance` (small = same) or `score` (large = same; distance =
    -score), with or without `rank`. TREC run: `qid Q0 docid rank score tag` without a header; as for
    trec_eval only its score counts. A missing rank follows (distance, gallery_id), a given one is renumbered
    from 1. Raises BadInput for a pair that is there twice, a value that is not finite, and distances that
    fall where the rank grows (then it is a similarity).
    """
    frame = _load(path, schemes)
    frame = _with_distance(frame, str(path))
    _check_pairs(frame, str(path))
    frame = _with_rank(frame, str(path))
    return tables.conform(pa.Table.from_pandas(frame, preserve_index=False), "candidates", str(path))


def _load(path: str | Path, schemes: frozenset[str]) -> pd.DataFrame:
    text = str(path)
    if locations.scheme_of(text) is None and Path(path).is_dir():
        return tables.load_parquet(path, "candidates").to_pandas()
    try:
        content = locations.read_bytes(text, schemes)
    except OSError as error:
        raise BadInput(f"cannot read the candidates {text}: {error.strerror or error}; check the path") from error
    if not content.strip():
        raise BadInput(f"{text} is empty: no readable Parquet, CSV or TREC run; check the path")
    if content[:4] == b"PAR1":
        return tables.load_parquet(path, "candidates").to_pandas()
    is_trec = b"," not in content.partition(b"\n")[0]
    layout: dict[str, Any] = (
        {"sep": r"\s+", "header": None, "names": _TREC_COLUMNS, "index_col": False} if is_trec else {}
    )
    layout |= {"dtype": str, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
    try:
        frame = pd.read_csv(io.BytesIO(content), **layout)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadInput(f"{text} is no readable Parquet, CSV or TREC run: {reason}") from error
    return frame.drop(columns=["q0", "rank", "tag"]) if is_trec else frame


def _with_distance(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    values = [name for name in ("distance", "score") if name in frame]
    needed = {"query_id", "gallery_id"}
    unknown = [name for name in frame.columns if name not in needed | {"rank", "distance", "score"}]
    if len(values) != 1 or unknown or not needed <= set(frame.columns):
        raise BadInput(
            f"{source}: columns {list(frame.columns)}; candidates have query_id, gallery_id, "
            "distance or score, and optionally rank"
        )
    numbers = _numbers(frame, values[0])
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise BadInput(f"{source}: {bad.sum()} values of {values[0]} are not finite, first in row {bad.argmax() + 1}")
    distances = (numbers if values[0] == "distance" else -numbers).astype(np.float32)
    return frame.drop(columns=values).assign(distance=distances)


def _numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    return np.asarray(pd.to_numeric(frame[column], errors="coerce"), dtype=np.float64)


def _check_pairs(frame: pd.DataFrame, source: str) -> None:
    empty = (frame["query_id"].isna() | frame["gallery_id"].isna()).to_numpy(dtype=bool)
    if empty.any():
        raise BadInput(f"{source}: {empty.sum()} rows without query_id or gallery_id, first row {empty.argmax() + 1}")
    repeated = frame.duplicated(["query_id", "gallery_id"], keep="first").to_numpy(dtype=bool)
    if repeated.any():
        row = int(repeated.argmax())
        pair = f"query {frame['query_id'].iloc[row]!r} and gallery item {frame['gallery_id'].iloc[row]!r}"
        raise BadInput(f"{source}: {pair} are paired twice (row {row + 1}); keep each pair once")


def _with_rank(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    has_rank = "rank" in frame
    if has_rank:
        frame = frame.assign(rank=_numbers(frame, "rank"))
        if not np.isfinite(frame["rank"]).all():
            raise BadInput(f"{source}: some ranks are empty or no numbers; fill them or remove the column")
    keys = ["query_id", *(["rank"] if has_rank else []), "distance", "gallery_id"]
    frame = frame.astype({"query_id": object, "gallery_id": object}).sort_values(keys, ignore_index=True)
    distances, queries = frame["distance"].to_numpy(), frame["query_id"].to_numpy()
    falls = (queries[1:] == queries[:-1]) & (distances[1:] < distances[:-1])
    if has_rank and falls.any():
        raise BadInput(
            f"{source}: distances of query {queries[1:][falls][0]!r} fall where the rank grows; "
            "if they are similarities, call the column score"
        )
    return frame.assign(rank=(frame.groupby("query_id").cumcount() + 1).astype(np.int32))
