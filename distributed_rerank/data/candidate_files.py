"""Candidate lists that any system wrote: Parquet, CSV or a TREC run, read in batches of rows (layer 2)."""

import io
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa

from distributed_rerank.data import locations, manifests, tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.gathering import gather_lists
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors.candidate_lists import CandidateLists

ROWS_PER_BATCH = 1 << 20
_HEAD = 1 << 16
_TREC_COLUMNS = ["query_id", "q0", "gallery_id", "rank", "score", "tag"]


def read_candidates(
    path: str | Path,
    catalogue: Catalogue,
    *,
    ignored: Set[str] = frozenset(),
    schemes: frozenset[str] = locations.SCHEMES,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> CandidateLists:
    """Candidate lists from Parquet (file or folder), CSV or a TREC run, as items of `catalogue`.

    Columns, order and what is refused: see `gather_lists`. TREC run: `qid Q0 docid rank score tag` without a header; as
    for trec_eval only its score counts. Rows with an id of `ignored` (images that cannot be read) are left out. Raises
    BadInput where nothing can be read.
    """
    batches = _batches(path, schemes, rows_per_batch)
    return gather_lists(batches, catalogue, source=str(path), ignored=ignored)


def _batches(path: str | Path, schemes: frozenset[str], rows: int) -> Iterator[pa.Table]:
    if locations.scheme_of(str(path)) is None and Path(path).is_dir():
        yield from tables.load_batches(path, "candidates", rows)
        return
    with _opened(str(path), schemes) as file:
        head = file.read(_HEAD)
        file.seek(0)
        if not head.strip():
            raise BadInput(f"{path} is empty: no readable Parquet, CSV or TREC run; check the path")
        if head[:4] == b"PAR1":
            yield from tables.load_batches(file, "candidates", rows, str(path))
        else:
            yield from _text_batches(file, b"," not in head.partition(b"\n")[0], rows, str(path))


def _opened(text: str, schemes: frozenset[str]) -> BinaryIO:
    try:
        if locations.scheme_of(text) is None:
            manifests.check_paths([Path(text)])
            return open(text, "rb")
        return io.BytesIO(locations.read_bytes(text, schemes))
    except OSError as error:
        raise BadInput(f"cannot read the candidates {text}: {error.strerror or error}; check the path") from error


def _text_batches(file: BinaryIO, is_trec: bool, rows: int, source: str) -> Iterator[pa.Table]:
    layout: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
    if is_trec:
        layout |= {"sep": r"\s+", "header": None, "names": _TREC_COLUMNS, "index_col": False}
        layout["usecols"] = ["query_id", "gallery_id", "score"]
    try:
        for frame in pd.read_csv(file, chunksize=rows, **layout):
            yield pa.Table.from_pandas(frame, preserve_index=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadInput(f"{source} is no readable Parquet, CSV or TREC run: {reason}") from error
