"""Relevant gallery items, against a loop over all pairs."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.relevance import check_measurable, count_relevant
from distributed_rerank.errors import BadInput

row = st.tuples(st.sampled_from([None, "x", "y", "z"]), st.sampled_from([None, "1", "2"]), st.booleans(), st.booleans())


def catalogue_of(rows: list[tuple]) -> Catalogue:
    table = pd.DataFrame(rows, columns=["label", "sequence", "is_query", "is_gallery"])
    return Catalogue(
        table.astype({"label": object, "sequence": object}).assign(id=list(map(str, table.index))), "df.csv"
    )


@given(st.lists(row, min_size=1, max_size=12))
def test_count_relevant_equals_a_loop(rows: list[tuple]) -> None:
    expected = [
        sum(
            is_gallery and other != query and label == rows[query][0] and (mine is None or theirs != mine)
            for other, (label, theirs, _, is_gallery) in enumerate(rows)
        )
        if rows[query][0] is not None
        else 0
        for query, (_, mine, is_query, _) in enumerate(rows)
        if is_query
    ]
    catalogue = catalogue_of(rows)
    assert count_relevant(catalogue).tolist() == expected
    if any(expected):
        check_measurable(catalogue)
    else:
        with pytest.raises(BadInput, match=r"df\.csv: (none of the|no row of this split has)"):
            check_measurable(catalogue)


def test_causes_are_counted_apart() -> None:
    rows = [("x", "1", True, True), ("x", "1", True, True), ("y", None, True, True)]
    with pytest.raises(BadInput, match="2 have such items in their own sequence alone, 1 have no other gallery item"):
        check_measurable(catalogue_of(rows))
    assert count_relevant(catalogue_of(rows)).dtype == np.int64
