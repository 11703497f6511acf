"""The words that options of more than one stage take."""

from typing import Literal

UnscoredPairs = Literal["behind", "error"]
MissingLists = Literal["error", "miss", "leave_out"]
DistanceKind = Literal["l2", "squared_l2", "cosine", "one_minus_cosine", "inner_product"]
