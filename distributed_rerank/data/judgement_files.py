"""Judgements from their files: TREC's qrels, the tables of BEIR and of MIEB."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from distributed_rerank.data.judgements import COLUMNS, Judgements
from distributed_rerank.data.table_files import TableFile
from distributed_rerank.data.text_columns import as_numbers, as_texts
from distributed_rerank.data.texts import Texts
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

_OTHER_NAMES = {"query-id": "query_id", "corpus-id": "gallery_id", "score": "relevance"}
_ROWS_PER_BATCH = 1 << 20


def read_judgements(
    location: str, queries: Texts, gallery: Texts, schemes: frozenset[str] = locations.SCHEMES
) -> Judgements:
    """Grades from CSV or Parquet (query_id, gallery_id, relevance), a table of BEIR, or TREC qrels.

    BEIR calls the columns query-id, corpus-id, score. Qrels have no header: query, anything, item, grade. `queries` and
    `gallery` are the ids that the catalogue has. Raises BadInput for ids that it has not, a pair with two grades, a
    grade that is no number, and a query that has no relevant item at all.
    """
    table = _read(TableFile(location, schemes, "judgements", "no readable Parquet, CSV or TREC qrels"))
    ids = {name: as_texts(table[name], name) for name in COLUMNS[:2]}
    for name, known, flag in (("query_id", queries, "is_query"), ("gallery_id", gallery, "is_gallery")):
        _require_known(location, ids[name], known, flag)
    grades = as_numbers(table["relevance"])
    if not np.isfinite(grades).all():
        row = int(np.flatnonzero(~np.isfinite(grades))[0])
        cell = table["relevance"][row].as_py()
        raise BadInput(f"--judgements {location}: row {row + 1} has the relevance {cell!r}; write 1, 0 or -1")
    found = pa.table({**ids, "relevance": pa.array(grades.astype(np.float32))})
    counts = found.group_by(list(COLUMNS[:2])).aggregate([("relevance", "count")])
    twice = counts.filter(pc.greater(counts["relevance_count"], 1))
    if len(twice):
        pair = twice.slice(0, 1).to_pylist()[0]
        raise BadInput(
            f"--judgements {location}: {len(twice)} pairs have two grades, first query {pair['query_id']!r} with "
            f"{pair['gallery_id']!r}; keep one"
        )
    if not (grades > 0).any():
        raise BadInput(f"--judgements {location}: no pair is relevant (above 0), so nothing can be measured")
    return Judgements(found)


def _require_known(location: str, ids: pa.Array, known: Texts, flag: str) -> None:
    places = known.places_of(ids)
    if (places < 0).any():
        unknown = pc.unique(ids.filter(pa.array(places < 0))).to_pylist()
        raise BadInput(
            f"--judgements {location}: {len(unknown)} ids are no {flag} rows of the catalogue's split, first "
            f"{unknown[0]!r}; give the catalogue they come from or another --split"
        )


def _read(file: TableFile) -> pa.Table:
    if file.is_parquet:
        return _renamed(file.parquet_table(lambda names: _wanted(names, file.location)))
    known = {*COLUMNS, *_OTHER_NAMES}
    first = next((line for line in file.head.decode("utf-8", "replace").splitlines() if line.strip()), "")
    if not known & set(re.split(r"[,;|\t ]", first)) and len(first.split()) == 4:
        return _read_qrels(file)
    return _renamed(
        pa.concat_tables(file.csv_batches(lambda names: _wanted(names, file.location), known, _ROWS_PER_BATCH))
    )


def _wanted(names: Sequence[str], location: str) -> list[str]:
    """The columns of the header that hold query, item and grade, in this order."""
    found = {_OTHER_NAMES.get(name, name): name for name in names if _OTHER_NAMES.get(name, name) in COLUMNS}
    absent = [name for name in COLUMNS if name not in found]
    if absent:
        raise BadInput(
            f"--judgements {location} has no column {', '.join(absent)}; it needs query_id, gallery_id and relevance, "
            "or BEIR's query-id, corpus-id and score"
        )
    return [found[name] for name in COLUMNS]


def _renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns(list(COLUMNS))


def _read_qrels(file: TableFile) -> pa.Table:
    with file.reading(), file.open() as content:
        lines = [line.split() for line in content.read().decode("utf-8").splitlines() if line.strip()]
    wrong = next((number for number, fields in enumerate(lines, 1) if len(fields) != 4), None)
    if wrong is not None:
        raise BadInput(
            f"--judgements {file.location}: line {wrong} has {len(lines[wrong - 1])} fields; qrels have four: query, "
            "anything, item, grade"
        )
    query, _, item, grade = zip(*lines, strict=True)
    return pa.table(dict(zip(COLUMNS, (list(query), list(item), list(grade)), strict=True)))
