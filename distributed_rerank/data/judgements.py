"""What answers each query, said pair by pair and not by labels.

A grade above 0 means relevant, 0 means looked at and not relevant. Below 0 the candidate counts as neither ("junk" of
ROxford and RParis): it leaves the lists before anything is measured. A pair without a grade is not relevant.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distributed_rerank.data.texts import Texts, json_of_columns
from distributed_rerank.storage.files import text_digest

COLUMNS = ("query_id", "gallery_id", "relevance")


@dataclass(frozen=True)
class Judgements:
    """Grades of pairs of ids; no pair twice."""

    table: pa.Table
    """query_id and gallery_id (text), relevance (float32)."""

    def pairs(self, ids: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query item, gallery item and grade of the pairs whose ids are both among `ids` (of item 0, 1, ...)."""
        queries, candidates = (ids.places_of(self.table[name]) for name in COLUMNS[:2])
        is_there = (queries >= 0) & (candidates >= 0)
        return queries[is_there], candidates[is_there], self.table["relevance"].to_numpy()[is_there]

    def digest(self) -> str:
        """sha256 of the grades, whatever the order of the rows and the form of the file."""
        ordered = self.table.sort_by([(name, "ascending") for name in COLUMNS[:2]])
        return text_digest(json_of_columns((name, ordered[name]) for name in COLUMNS))
