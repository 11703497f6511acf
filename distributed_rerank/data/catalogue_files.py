"""Catalogues from their tables, CSV or Parquet: read, checked, sorted by id."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from distributed_rerank.data import catalogue_checks
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_checks import BOX as BOX_COLUMNS
from distributed_rerank.data.catalogue_columns import Columns, full_paths, normalise
from distributed_rerank.data.stored_table import CODED, load_table
from distributed_rerank.data.text_codes import codes_of, constant_codes, in_order_of_rows, ordered_codes
from distributed_rerank.data.text_columns import refuse_equal_numbers
from distributed_rerank.data.texts import as_series
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.storage import locations, paths

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

Purpose = Literal["images", "evaluation", "training"]

_ORDER = ("id", "path", "written_path", *CODED, *BOX_COLUMNS)


def read_catalogue(
    uri: str,
    *,
    purpose: Purpose = "images",
    schemes: frozenset[str] = locations.SCHEMES,
    allow_shared_labels: bool = False,
    image_roots: Sequence[str] = (),
) -> Catalogue:
    """Read and check a catalogue, CSV or Parquet, from a local path or URI.

    `purpose` decides what must be there: "images" only `path`; "evaluation" labels, a validation split,
    queries and a gallery in it; "training" labels and a train split with two images of every label. For the
    last two no label may be in both splits, unless `allow_shared_labels`. OML's tables are read unchanged.

    Ids, labels, categories, sequences and items are text, the same from CSV and from Parquet; words for "no value"
    (`NULL`, `nan`, ...) count as empty. Boxes keep OML's meaning (pixels, fractions are cut off). An `id`
    defaults to the path as written, plus the box. Missing image files are not looked for here: they become
    rejects, as do images outside `ImageRoots`, which `image_roots` narrows. Raises BadInput with everything that is
    wrong.
    """
    assert purpose in get_args(Purpose), f"unknown purpose {purpose!r}"
    problems = catalogue_checks.Problems(uri)
    folder = paths.folder_of(uri)
    roots = paths.make_roots([folder], image_roots)
    columns = normalise(load_table(uri, schemes), purpose, problems)
    order = _order_of(columns["id"])
    catalogue_checks.check_ids(columns["id"], order, problems)
    if purpose == "evaluation":
        catalogue_checks.check_evaluation(columns, problems)
    if purpose == "training":
        catalogue_checks.check_training(columns, problems)
    if purpose != "images":
        catalogue_checks.check_things(columns, problems)
        catalogue_checks.check_shared_labels(columns, allow_shared_labels, problems)
    problems.raise_if_any()
    problems.log_words_for_no_value()
    if order is not None:
        _take(columns, order)
    # Last, for it is the longest column and can be made from another: nothing else is held beside it any more.
    give_back_memory()
    columns["path"] = full_paths(folder, columns["written_path"])
    give_back_memory()
    return Catalogue(_frame(columns), uri, roots)


def read_query_gallery(
    query_uri: str,
    gallery_uri: str,
    *,
    purpose: Literal["images", "evaluation"] = "images",
    schemes: frozenset[str] = locations.SCHEMES,
    image_roots: Sequence[str] = (),
) -> Catalogue:
    """One catalogue from two tables: rows of the first are queries only, rows of the second gallery items
    only.

    Their own `split`, `is_query` and `is_gallery` are ignored. An id in both tables must be the same image
    with the same content, and becomes one row that is both. Raises BadInput with everything that is wrong.
    """
    sides: list[Columns] = []
    for uri, is_query, is_gallery in ((query_uri, "1", "0"), (gallery_uri, "0", "1")):
        problems = catalogue_checks.Problems(uri)
        stored = load_table(uri, schemes).with_constants(split="validation", is_query=is_query, is_gallery=is_gallery)
        columns = normalise(stored, purpose, problems)
        catalogue_checks.check_ids(columns["id"], _order_of(columns["id"]), problems)
        if purpose == "evaluation":
            catalogue_checks.check_labels(columns, "validation", problems)
        problems.raise_if_any()
        problems.log_words_for_no_value()
        columns["path"] = full_paths(paths.folder_of(uri), columns["written_path"])
        sides.append(columns)
    _refuse_spellings(sides[0], sides[1], query_uri, gallery_uri)
    union = _union(sides[0], sides[1], f"{query_uri} and {gallery_uri}")
    del sides, columns
    give_back_memory()
    roots = paths.make_roots([paths.folder_of(uri) for uri in (query_uri, gallery_uri)], image_roots)
    return Catalogue(_frame(union), f"{query_uri} and {gallery_uri}", roots)


def _refuse_spellings(queries: Columns, gallery: Columns, query_uri: str, gallery_uri: str) -> None:
    """Raises BadInput where one table spells a number as the other does not: a float column of both may not be one."""
    for name in ("id", "label", "category", "sequence", "item"):
        if name in queries and name in gallery:
            columns = {
                f"{role} {uri}": in_order_of_rows(side[name]) if name in CODED else side[name]
                for role, uri, side in (("queries", query_uri, queries), ("gallery", gallery_uri, gallery))
            }
            try:
                refuse_equal_numbers(columns, name)
            except BadInput as error:
                raise BadInput(f"{query_uri} and {gallery_uri}: {error}") from error


def _union(queries: Columns, gallery: Columns, source: str) -> Columns:
    """The rows of both, sorted by id; an id of both is one row, that of the queries. The sides are used up."""
    n_queries, n_gallery = len(queries["id"]), len(gallery["id"])
    names = [*queries, *(name for name in gallery if name not in queries)]
    both = {name: _stacked(name, [(queries, n_queries), (gallery, n_gallery)]) for name in names}
    order = pc.array_sort_indices(both["id"])
    ids = both["id"].take(order)
    is_again = np.append(False, pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False))
    order, again = order.to_numpy(), np.flatnonzero(is_again)
    # Of two equal ids that of the queries comes first.
    first, second = order[again - 1], order[again]
    content = [name for name in ("path", "label", "sequence", "category", "item", *BOX_COLUMNS) if name in both]
    differs = np.any([_differ(both[name], first, second) for name in content], axis=0)
    clashing = ids.take(pa.array(again[differs])).to_pylist()
    if clashing:
        raise BadInput(
            f"ids {catalogue_checks.some(clashing)} stand for different rows in {source}; "
            "give both tables an id column without clashes"
        )
    both["is_query"] = np.arange(n_queries + n_gallery) < n_queries
    both["is_gallery"] = ~both["is_query"]
    both["is_gallery"][first] = True
    _take(both, pa.array(order[~is_again]))
    coded = [name for name in both if isinstance(both[name], pa.DictionaryArray)]
    return both | {name: ordered_codes(both[name], by_value=name == "label") for name in coded}


def _stacked(name: str, sides: Sequence[tuple[Columns, int]]) -> Any:
    """A column of both tables, one below the other; empty cells for one of so many rows that has no such column."""
    if name in BOX_COLUMNS:
        return np.concatenate([side.pop(name, np.full(n_rows, np.nan)) for side, n_rows in sides])
    if name in ("is_query", "is_gallery"):
        return np.concatenate([side.pop(name) for side, _ in sides])
    if name in CODED:
        parts = [side.pop(name, constant_codes(None, n_rows)) for side, n_rows in sides]
        plain = [pa.DictionaryArray.from_arrays(part.indices, part.dictionary) for part in parts]
        return pa.chunked_array(plain).unify_dictionaries().combine_chunks()
    return pa.concat_arrays([side.pop(name) for side, _ in sides])


def _differ(column: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where the cells of two rows are not the same; two empty ones are."""
    if isinstance(column, np.ndarray):
        return (column[first] != column[second]) & ~(np.isnan(column[first]) & np.isnan(column[second]))
    if isinstance(column, pa.DictionaryArray):
        return codes_of(column)[first] != codes_of(column)[second]
    return pc.not_equal(column.take(pa.array(first)), column.take(pa.array(second))).to_numpy(zero_copy_only=False)


def _order_of(ids: pa.Array) -> pa.Array | None:
    """The rows in the order of their ids; None where that is the table's."""
    # Arrow orders UTF-8 bytes, and so code points, without making a Python object of each comparison.
    if pc.all(pc.greater_equal(ids[1:], ids[:-1])).as_py() is not False:
        return None
    return pc.array_sort_indices(ids)


def _take(columns: Columns, order: pa.Array) -> None:
    """Puts the rows of all columns in this order, one column after the other."""
    is_path_id = columns["written_path"] is columns["id"]
    for name in columns:
        if name == "written_path" and is_path_id:
            columns[name] = columns["id"]  # they stay one piece of memory
        elif isinstance(columns[name], np.ndarray):
            columns[name] = columns[name][order.to_numpy()]
        else:
            columns[name] = columns[name].take(order)


def _frame(columns: Columns) -> pd.DataFrame:
    """The table of a catalogue on the memory of its columns."""
    present = [name for name in _ORDER if name in columns]
    series = {name: as_series(columns[name]) if isinstance(columns[name], pa.Array) else columns[name]
              for name in present}  # fmt: skip
    return pd.DataFrame(series, copy=False)
