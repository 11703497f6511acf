"""Candidate lists that any system wrote: Parquet, CSV or a TREC run, read in batches of rows."""

import io
from collections.abc import Iterator, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.csv_files import layout_of, regrouped
from distributed_rerank.data.distance_kinds import Conversion
from distributed_rerank.data.exports import OWN_TAG
from distributed_rerank.data.gathering import gather_lists
from distributed_rerank.data.table_files import TableFile
from distributed_rerank.data.text_columns import is_index_column
from distributed_rerank.data.texts import Texts
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations, manifests, paths
from distributed_rerank.tensors.candidate_lists import CandidateLists

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

ROWS_PER_BATCH = 1 << 20
_LINES_PER_TABLE = 1 << 15
_COLUMNS = frozenset({"query_id", "gallery_id", "distance", "score", "rank"})
_TREC_COLUMNS = ("query_id", "q0", "gallery_id", "rank", "score", "tag")


def read_candidates(
    path: str | Path,
    catalogue: Catalogue,
    *,
    ignored: Set[str] = frozenset(),
    conversion: Conversion | None = None,
    schemes: frozenset[str] = locations.SCHEMES,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> CandidateLists:
    """Candidate lists from Parquet (file or folder), CSV or a TREC run, as items of `catalogue`.

    Columns, order and what is refused: see `gather_lists`. TREC run: `qid Q0 docid rank score tag` without a header; as
    for trec_eval only its score counts. Percent-encoded ids of a run that `write_trec_run` wrote are decoded, and in
    other runs those that the catalogue does not have as they are written. Rows with an id of `ignored` (images that
    cannot be read) are left out. Raises BadInput where nothing can be read.
    """
    batches = _batches(path, catalogue, schemes, rows_per_batch)
    return gather_lists(batches, catalogue, source=str(path), ignored=ignored, conversion=conversion)


def _batches(path: str | Path, catalogue: Catalogue, schemes: frozenset[str], rows: int) -> Iterator[pa.Table]:
    is_local = paths.scheme_of(str(path)) is None
    if is_local and Path(path).is_dir():
        yield from tables.load_batches(path, "candidates", rows)
        return
    if is_local:
        manifests.check_paths([Path(path)])
    file = TableFile(str(path), schemes, "candidates", "no readable Parquet, CSV or TREC run")
    if file.is_parquet:
        with file.open() as content:
            yield from tables.load_batches(content, "candidates", rows, str(path))
    elif _is_trec(file):
        yield from _trec_batches(file, catalogue, rows)
    else:
        yield from file.csv_batches(lambda names: _wanted(names, str(path)), _COLUMNS, rows)


def _wanted(names: Sequence[str], source: str) -> list[str]:
    repeated = next((name for name in sorted(_COLUMNS) if names.count(name) > 1), None)
    if repeated is not None:
        raise BadInput(f"{source}: {names.count(repeated)} columns are called {repeated!r}; keep one of them")
    return [name for name in dict.fromkeys(names) if not is_index_column(name)]


def _is_trec(file: TableFile) -> bool:
    """Whether the first line is one of a TREC run, and not a header with a column of candidates."""
    if _COLUMNS & set(layout_of(file.head, _COLUMNS).header):
        return False
    fields = next((line.split() for line in file.head.split(b"\n") if line.strip()), [])
    if len(fields) > 1 and fields[1].upper() == b"Q0":
        return True
    return len(fields) == len(_TREC_COLUMNS) and all(_is_number(field) for field in fields[3:5])


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _trec_batches(file: TableFile, catalogue: Catalogue, rows: int) -> Iterator[pa.Table]:
    """Tables of query_id, gallery_id and score."""

    def tables_of(content: io.BufferedIOBase) -> Iterator[pa.Table]:
        n_lines = 0
        for lines in iter(lambda: list(islice(content, _LINES_PER_TABLE)), []):
            yield _trec_table(lines, n_lines, catalogue.ids, file.location)
            n_lines += len(lines)

    with file.reading(), file.open() as content:
        yield from regrouped(tables_of(content), rows)


def _trec_table(lines: Sequence[bytes], n_before: int, names: Texts, source: str) -> pa.Table:
    trimmed = pc.ascii_trim_whitespace(pa.array(lines, pa.large_binary()).cast(pa.large_string()))
    is_filled = pc.greater(pc.binary_length(trimmed), 0)
    # Of each line, its fields [field]; any run of blanks and tabs separates them.
    fields = pc.ascii_split_whitespace(trimmed)
    is_bad = pc.and_(is_filled, pc.not_equal(pc.list_value_length(fields), len(_TREC_COLUMNS)))
    if pc.any(is_bad).as_py():
        line = pc.index(is_bad, True).as_py()
        raise BadInput(
            f"{source}: line {n_before + line + 1} has {len(fields[line])} fields; a TREC run has "
            f"{len(_TREC_COLUMNS)}: query Q0 item rank score tag, and an id with blanks has them percent-encoded"
        )
    kept = fields.filter(is_filled)
    cells = {name: pc.list_element(kept, place) for place, name in enumerate(_TREC_COLUMNS)}
    is_own = pc.starts_with(cells["tag"], OWN_TAG)
    ids = {name: _decoded(cells[name], is_own, names) for name in ("query_id", "gallery_id")}
    return pa.table(ids | {"score": cells["score"]})


def _decoded(ids: pa.Array, is_own: pa.Array, names: Texts) -> pa.Array:
    """The ids without percent-encoding, where they have it; see `read_candidates`."""
    may_be = pc.match_substring(ids, "%")
    if not pc.any(may_be).as_py():
        return ids
    is_known = pa.array(names.places_of(ids) >= 0)
    is_encoded = pc.and_(may_be, pc.or_(is_own, pc.invert(is_known)))
    encoded = ids.filter(is_encoded).dictionary_encode()
    plain = pa.array([unquote(id) for id in encoded.dictionary.to_pylist()], pa.large_string())
    return pc.replace_with_mask(ids, is_encoded, plain.take(encoded.indices))
