"""Images that are there twice, against a loop over all pairs of files."""

import os
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.same_bytes import count_same_bytes

HEAD = "id,path,label,split,is_query,is_gallery,x_1,y_1,x_2,y_2\n"


def expected_counts(measured: Catalogue, train: Catalogue) -> dict[str, int]:
    """The same by reading every file and comparing every pair."""

    def content(ref: object) -> tuple[bytes, object] | None:
        path = Path(ref.path)  # pyright: ignore
        return (path.read_bytes(), ref.box) if path.is_file() else None  # pyright: ignore

    own, other = [content(ref) for ref in measured.images()], [content(ref) for ref in train.images()]
    pairs = [
        (query, item)
        for query, item in product(measured.query_items.tolist(), measured.gallery_items.tolist())
        if query != item and own[query] is not None and own[query] == own[item]
    ]
    two_labels = {query for query, item in pairs if measured.labels[query] != measured.labels[item]}
    return {
        "queries_in_gallery": len({query for query, _ in pairs}),
        "queries_under_two_labels": len(two_labels),
        "measured_in_train": sum(one is not None and one in other for one in own),
        "not_compared": sum(one is None for one in own),
    }


@given(
    st.lists(
        st.tuples(st.sampled_from([b"", b"a", b"b", b"cc", b"dd", None]), st.sampled_from("xy"),
                  st.sampled_from(["train", "validation"]), st.booleans(), st.booleans(), st.booleans()),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_counts_are_those_of_comparing_all_pairs(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    folder = tmp_path_factory.mktemp("same")
    text = HEAD
    for number, (content, label, split, is_query, is_gallery, has_box) in enumerate(rows):
        if content is not None:
            (folder / f"{number}.jpg").write_bytes(content)
        box = "1,1,9,9" if has_box else ",,,"
        text += f"{number},{number}.jpg,{label},{split},{is_query:d},{is_gallery:d},{box}\n"
    (folder / "df.csv").write_text(text)
    catalogue = read_catalogue(str(folder / "df.csv"))
    is_train = np.array(catalogue.table["split"] == "train")
    measured, train = (catalogue.take(np.flatnonzero(mask)) for mask in (~is_train, is_train))
    assert count_same_bytes(measured, train) == expected_counts(measured, train)
    shutil.rmtree(folder)


def test_two_rows_of_one_file_are_twins_and_a_pipe_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    os.mkfifo(tmp_path / "b.jpg")
    rows = "1,a.jpg,x,validation,1,1,,,,\n2,a.jpg,y,validation,1,1,,,,\n3,b.jpg,x,validation,1,1,,,,\n"
    rows += "4,s3://bucket/c.jpg,x,validation,1,1,,,,\n"
    (tmp_path / "df.csv").write_text(HEAD + rows)
    assert count_same_bytes(read_catalogue(str(tmp_path / "df.csv"))) == {
        "queries_in_gallery": 2, "queries_under_two_labels": 2, "measured_in_train": 0, "not_compared": 2
    }  # fmt: skip
