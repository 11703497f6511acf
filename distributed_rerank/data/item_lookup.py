"""Find the items of a catalogue that the ids in another system's table name."""

from collections.abc import Set

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from distributed_rerank.data.catalogue_checks import some
from distributed_rerank.data.text_columns import are_words_for_no_value, without_point
from distributed_rerank.data.texts import Texts
from distributed_rerank.errors import BadInput

IGNORED, PADDING, EMPTY = -1, -2, -3
"""Instead of an item: an id that is left out (or unknown), one that fills a list up, no id."""
_PADDING = frozenset({"-1", "-1.0", "18446744073709551615"})
"""What faiss writes for "no neighbour", and what that becomes as a float or an unsigned integer."""


class ItemLookup:
    """Item numbers of ids as `text_columns.as_texts` reads them, and the ids that the catalogue does not have.

    An id is sought as it is written. One that is not there is sought without the `.0` of a float, as the catalogue may
    have lost it too. `-1` is padding where it is no id of the catalogue.
    """

    def __init__(self, ids: Texts, source: str, ignored: Set[str]) -> None:
        """`ids` of item 0, 1, ... in the catalogue `source`. Those in `ignored` are known, and no items."""
        self._ids, self._source, self._ignored = ids, source, ignored
        self._unknown: set[str] = set()

    @property
    def has_unknown(self) -> bool:
        """Whether any id so far is neither in the catalogue nor ignored."""
        return bool(self._unknown)

    def items(
        self, queries: pa.Array, gallery: pa.Array
    ) -> tuple[Int64[np.ndarray, " run"], Int64[np.ndarray, " row"]]:
        """The items of both columns [row]; IGNORED, PADDING (of the gallery alone) or EMPTY where an id names none."""
        texts = pa.concat_arrays([queries, gallery])
        items = self._look_up(texts)
        missing = np.flatnonzero(items < 0)
        if len(missing):
            # Only the distinct ids that are not there are looked at one by one.
            lost = texts.take(pa.array(missing)).dictionary_encode()
            answers = self._answers(lost.dictionary)
            codes = lost.indices.fill_null(len(answers)).to_numpy(zero_copy_only=False)
            items[missing] = np.append(answers, EMPTY)[codes]
        query, item = items[: len(queries)], items[len(queries) :]
        is_padding = np.flatnonzero(query == PADDING)
        self._unknown.update(queries.take(pa.array(is_padding)).unique().to_pylist())
        query[is_padding] = IGNORED
        return query, item

    def raise_if_unknown(self, source: str) -> None:
        """Raises BadInput naming the ids that the catalogue does not have."""
        if not self._unknown:
            return
        unknown = sorted(self._unknown)
        padded = {id.lstrip("0"): id for id in self._ids if id.startswith("0") and id.isdigit()}
        hint = next((f"; {id!r} may be {padded[id]!r} without its zeros" for id in unknown if id in padded), "")
        raise BadInput(
            f"{source}: {len(unknown)} ids are not in {self._source}: {some(unknown)}{hint}; add them to the "
            "catalogue or give the catalogue they come from"
        )

    def _answers(self, lost: pa.Array) -> Int64[np.ndarray, " name"]:
        """What each distinct id stands for that the catalogue does not have as it is written."""
        names = lost.to_pylist()
        shorter = [without_point(name) or name for name in names]
        answers = self._look_up(pa.array(shorter, pa.large_string()))
        is_word = are_words_for_no_value(lost)
        for place in np.flatnonzero(answers < 0).tolist():
            name = names[place]
            if is_word[place]:
                answers[place] = EMPTY
            elif name in _PADDING:
                answers[place] = PADDING
            elif not {name, shorter[place]} & self._ignored:
                self._unknown.add(name)
        return answers

    def _look_up(self, texts: pa.Array) -> Int64[np.ndarray, " row"]:
        return self._ids.places_of(texts)
