"""Catalogues from their tables, CSV or Parquet: read, checked, sorted by id."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import pandas as pd
import pyarrow.compute

from distributed_rerank.data import catalogue_checks
from distributed_rerank.data.catalogue import Catalogue, with_codes
from distributed_rerank.data.catalogue_checks import BOX as BOX_COLUMNS
from distributed_rerank.data.catalogue_columns import load_table, normalise
from distributed_rerank.data.text_columns import refuse_equal_numbers
from distributed_rerank.data.texts import as_column
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.storage import locations, paths

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

Purpose = Literal["images", "evaluation", "training"]


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
    table = normalise(load_table(uri, schemes), folder, purpose, problems)
    catalogue_checks.check_ids(table, problems)
    if purpose == "evaluation":
        catalogue_checks.check_evaluation(table, problems)
    if purpose == "training":
        catalogue_checks.check_training(table, problems)
    if purpose != "images":
        catalogue_checks.check_things(table, problems)
        catalogue_checks.check_shared_labels(table, allow_shared_labels, problems)
    problems.raise_if_any()
    problems.log_words_for_no_value()
    table = with_codes(_sorted_by_id(table))
    give_back_memory()
    return Catalogue(table, uri, roots)


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
    tables: list[pd.DataFrame] = []
    for uri, is_query, is_gallery in ((query_uri, "1", "0"), (gallery_uri, "0", "1")):
        problems = catalogue_checks.Problems(uri)
        raw = load_table(uri, schemes).with_constants(split="validation", is_query=is_query, is_gallery=is_gallery)
        table = normalise(raw, paths.folder_of(uri), purpose, problems)
        catalogue_checks.check_ids(table, problems)
        if purpose == "evaluation":
            catalogue_checks.check_labels(table, "validation", problems)
        problems.raise_if_any()
        problems.log_words_for_no_value()
        tables.append(table)
    _refuse_spellings(tables[0], tables[1], query_uri, gallery_uri)
    union = _union(tables[0], tables[1], f"{query_uri} and {gallery_uri}")
    roots = paths.make_roots([paths.folder_of(uri) for uri in (query_uri, gallery_uri)], image_roots)
    union = with_codes(_sorted_by_id(union))
    give_back_memory()
    return Catalogue(union, f"{query_uri} and {gallery_uri}", roots)


def _refuse_spellings(queries: pd.DataFrame, gallery: pd.DataFrame, query_uri: str, gallery_uri: str) -> None:
    """Raises BadInput where one table spells a number as the other does not: a float column of both may not be one."""
    for name in ("id", "label", "category", "sequence", "item"):
        if name in queries and name in gallery:
            columns = {
                f"{role} {uri}": as_column(table[name])
                for role, uri, table in (("queries", query_uri, queries), ("gallery", gallery_uri, gallery))
            }
            try:
                refuse_equal_numbers(columns, name)
            except BadInput as error:
                raise BadInput(f"{query_uri} and {gallery_uri}: {error}") from error


def _union(queries: pd.DataFrame, gallery: pd.DataFrame, source: str) -> pd.DataFrame:
    both = pd.concat([queries, gallery], ignore_index=True)
    content = [name for name in ("path", "label", "sequence", "category", "item", *BOX_COLUMNS) if name in both]
    distinct = pd.Series(both.drop_duplicates(["id", *content])["id"])
    clashing = sorted(set(distinct[distinct.duplicated()]))
    if clashing:
        raise BadInput(
            f"ids {catalogue_checks.some(clashing)} stand for different rows in {source}; "
            "give both tables an id column without clashes"
        )
    merged = both.drop_duplicates("id", ignore_index=True)
    return merged.assign(is_query=merged["id"].isin(queries["id"]), is_gallery=merged["id"].isin(gallery["id"]))


def _sorted_by_id(table: pd.DataFrame) -> pd.DataFrame:
    # Arrow orders UTF-8 bytes, and so code points, without making a Python object of each comparison.
    ids = as_column(table["id"])
    if pc.all(pc.greater_equal(ids[1:], ids[:-1])).as_py() is not False:
        return table.reset_index(drop=True)
    return table.take(pc.array_sort_indices(ids).to_numpy()).reset_index(drop=True)
