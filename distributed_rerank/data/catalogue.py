"""The catalogue: one row an image (or a box in an image), with its id, label and role in retrieval.

A catalogue is sorted by id in code-point order; a row's position is its *item* number. Inside the program
images are item numbers of one catalogue, and "ties by item" is therefore "ties by id". Files carry ids only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int32, Int64

from distributed_rerank.data import catalogue_checks
from distributed_rerank.data.catalogue_checks import BOX as BOX_COLUMNS
from distributed_rerank.data.judgements import Judgements
from distributed_rerank.data.text_codes import codes_of, known_codes, ordered_codes
from distributed_rerank.data.texts import Texts, as_column, as_series, json_of_columns
from distributed_rerank.errors import BadInput
from distributed_rerank.storage.files import text_digest
from distributed_rerank.storage.paths import ImageRoots
from distributed_rerank.tensors import sharding

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

_DIGEST_COLUMNS = (
    "id",
    "written_path",
    "label",
    "split",
    "is_query",
    "is_gallery",
    "category",
    "sequence",
    "item",
    *BOX_COLUMNS,
)
_REPEATED = ("label", "split", "category", "sequence", "item")
"""Columns in which a text may be that of many rows: the table holds each text once, and a number a row."""


@dataclass(frozen=True)
class ImageRef:
    """Where an image's pixels are: absolute path or URI, and the box (left, top, right, bottom)."""

    id: str
    path: str
    box: tuple[int, int, int, int] | None = None
    roots: ImageRoots = field(default=ImageRoots(), compare=False)
    """Where images may lie."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """A checked table, sorted by id, with a RangeIndex.

    Columns: `id`, `path` (absolute or a URI), `written_path` (as in the user's table), `label` (text or
    None), `split` ("train", "validation" or ""), `is_query`, `is_gallery` (bool; always False in train rows,
    as in OML), and the optional `category`, `sequence`, `item` (text or None) and `x_1, y_1, x_2, y_2` (float,
    NaN = no box). Names are text, as `text_columns` reads them: `01` and `1` are two labels. Columns of text are
    Arrow's: no cell is a Python object before somebody asks for it. Those of `catalogue_files` hold a
    repeated text once, and `labels` and `sequences` are the table's own memory.
    """

    table: pd.DataFrame
    source: str
    roots: ImageRoots = ImageRoots()
    """Where its images may lie."""
    judgements: Judgements | None = None
    """What answers each query, in place of the labels."""

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def ids(self) -> Texts:
        """Ids, ascending."""
        return Texts(self.texts("id"))

    def texts(self, column: str) -> pa.Array:
        """The cells of a column of texts [item], null = none; all null where the table has no such column."""
        if column not in self.table:
            return pa.nulls(len(self), pa.large_string())
        return as_column(self.table[column])

    @cached_property
    def labels(self) -> Int32[np.ndarray, " item"]:
        """Codes into `label_names`; -1 = no label. Read-only."""
        return codes_of(self._codes("label"))

    @cached_property
    def label_names(self) -> Texts:
        """The labels present: by value where all are integers, else in code-point order; so are `1` and `01`."""
        return Texts(self._codes("label").dictionary)

    @cached_property
    def sequences(self) -> Int32[np.ndarray, " item"]:
        """Codes of the sequences in this catalogue; -1 = none. Read-only."""
        if "sequence" not in self.table:
            return np.broadcast_to(np.int32(-1), len(self))  # one number, however many items
        return codes_of(self._codes("sequence"))

    def _codes(self, column: str) -> pa.DictionaryArray:
        known = known_codes(self.table[column])
        return ordered_codes(self.table[column], by_value=column == "label") if known is None else known

    @cached_property
    def things(self) -> Int64[np.ndarray, " item"] | None:
        """What each photo shows, by the column `item`: codes into `thing_names`; a photo without one is its own thing.

        None where the table has no such column.
        """
        if "item" not in self.table:
            return None
        codes = codes_of(self._codes("item")).astype(np.int64)
        alone = codes < 0
        return np.where(alone, codes.max(initial=-1) + np.cumsum(alone), codes)

    @cached_property
    def thing_names(self) -> np.ndarray:
        """The `item` of each of `things`; for a photo that is its own thing, the id. An object array of str."""
        assert self.things is not None, "the catalogue has no column item"
        first = np.unique(self.things, return_index=True)[1]
        return Texts(pc.coalesce(self.texts("item"), self.ids.column))[first]

    @cached_property
    def categories(self) -> Int32[np.ndarray, " item"] | None:
        """Codes into `category_names`; -1 = none, which is the last of these. None where the column is absent."""
        return codes_of(self._codes("category")) if "category" in self.table else None

    @cached_property
    def category_names(self) -> np.ndarray:
        """The categories present in code-point order, and "" behind them. An object array of str."""
        return np.array([*self._codes("category").dictionary.to_pylist(), ""], object)

    @cached_property
    def query_items(self) -> Int64[np.ndarray, " query"]:
        """Items marked `is_query`, ascending."""
        return np.flatnonzero(self.table["is_query"].to_numpy(dtype=bool)).astype(np.int64)

    @property
    def is_gallery(self) -> Bool[np.ndarray, " item"]:
        """Whether each item is marked `is_gallery`: the table's own memory."""
        return self.table["is_gallery"].to_numpy(dtype=bool)

    @property
    def n_gallery(self) -> int:
        """How many gallery items there are."""
        return int(self.is_gallery.sum())

    @property
    def gallery_items(self) -> Int64[np.ndarray, " gallery"]:
        """Items marked `is_gallery`, ascending; made anew each time, for they may be all items."""
        return np.flatnonzero(self.is_gallery).astype(np.int64)

    def gallery_blocks(self, size: int) -> Iterator[Int64[np.ndarray, " gallery"]]:
        """The gallery items among each `size` items, ascending."""
        for start, stop in sharding.blocks(len(self), size):
            yield start + np.flatnonzero(self.is_gallery[start:stop])

    def roles(self) -> tuple[Texts, Texts]:
        """The ids of the queries and of the gallery, ascending."""
        return Texts(self.ids[self.query_items]), Texts(self.ids[self.gallery_items])

    def restrict(self, split: str) -> "Catalogue":
        """The rows of one split, numbered anew. Raises BadInput where there are none."""
        column = self._codes("split")
        is_own = codes_of(column) == column.dictionary.index(split).as_py()
        if not is_own.any():
            raise BadInput(f"{self.source}: no row has split {split!r}; set it in the table or choose another split")
        return self if is_own.all() else self.take(np.flatnonzero(is_own))

    def take(self, items: np.ndarray) -> "Catalogue":
        """The rows of these items, in id order whatever the order given, numbered anew; no item twice."""
        items = np.sort(np.asarray(items))
        assert np.all(items[1:] > items[:-1]), "an item is taken twice"
        if len(items) == len(self):
            return self
        return replace(self, table=with_codes(self.table.iloc[items].reset_index(drop=True)))

    def without_labels(self, items: np.ndarray) -> "Catalogue":
        """The same rows, these items without a label."""
        is_without = self.labels < 0
        is_without[items] = True
        codes = pa.array(self.labels, mask=is_without)
        labels = pa.DictionaryArray.from_arrays(codes, self._codes("label").dictionary)
        return replace(self, table=with_codes(self.table.assign(label=as_series(labels))))

    def as_query_and_gallery(self) -> "Catalogue":
        """The same rows, each both query and gallery item: how training images search among themselves."""
        return replace(self, table=self.table.assign(is_query=True, is_gallery=True))

    def images(self, items: np.ndarray | None = None) -> list[ImageRef]:
        """Image references of all rows, or of `items` in the order given (repeats allowed)."""
        table = self.table if items is None else self.table.iloc[items]
        ids, paths = table["id"].tolist(), table["path"].tolist()
        if BOX_COLUMNS[0] not in table:
            return [ImageRef(id, path, None, self.roots) for id, path in zip(ids, paths, strict=True)]
        corners = table[list(BOX_COLUMNS)].to_numpy(dtype=np.float64)
        boxes = [None if np.isnan(row[0]) else tuple(int(value) for value in row) for row in corners]
        return [ImageRef(*row, self.roots) for row in zip(ids, paths, boxes, strict=True)]  # pyright: ignore

    def refs(self, items: np.ndarray) -> "ImageRefs":
        """`images` of these items, made only as they are asked for."""
        return ImageRefs(self, items)

    def items_of(self, ids: Any) -> Int64[np.ndarray, " id"]:
        """Item numbers of these ids. Raises BadInput naming ids that are not in the catalogue."""
        items = self.ids.places_of(ids)
        if (items < 0).any():
            unknown = sorted(set(Texts(ids)[items < 0]))
            raise BadInput(
                f"{len(unknown)} ids are not in {self.source}: {catalogue_checks.some(unknown)}; "
                "add them to the catalogue or give the catalogue they come from"
            )
        return items

    def digest(self) -> str:
        """sha256 of what results depend on: ids, paths as written, labels, split, flags, boxes, sequence,
        category, item.

        The order of rows and columns in the user's file, its format and its other columns do not matter.
        """
        present = [name for name in _DIGEST_COLUMNS if name in self.table]
        pieces = json_of_columns((name, self.table[name]) for name in present)
        return text_digest(pieces if self.judgements is None else chain(pieces, [self.judgements.digest()]))


@dataclass(frozen=True)
class ImageRefs(Sequence[ImageRef]):
    """The image references of some items of a catalogue. A slice is one of these, and as small."""

    catalogue: Catalogue
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, places: Any) -> Any:
        """The reference at a place, or those of a slice."""
        if isinstance(places, slice):
            return ImageRefs(self.catalogue, self.items[places])
        return self.catalogue.images(self.items[places : places + 1])[0]

    def __iter__(self) -> Iterator[ImageRef]:
        return iter(self.catalogue.images(self.items))


def with_codes(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each text of the columns `_REPEATED` held once."""
    present = [name for name in _REPEATED if name in table]
    return table.assign(**{name: as_series(ordered_codes(table[name], by_value=name == "label")) for name in present})
