"""One table in CSV and in Parquet is one catalogue, and lists are found in either."""

import tempfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table_forms import FORMS

from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.candidates import CandidateLists, candidates_table
from distributed_rerank.data.catalogue_files import read_catalogue, read_query_gallery
from distributed_rerank.data.exports import write_trec_run
from distributed_rerank.errors import BadInput

words = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=5)
tricky = st.sampled_from(
    ["01", "1", "7", "7.0", "8.0", "-0", "1e5", "0x1", "NA", "nan", "", " ", "a,b", 'a"b', "a;b\n"]
)
names = st.lists(words | tricky, min_size=2, max_size=6)
columns_of_names = st.one_of(
    names,
    st.lists(st.none() | st.integers(-(2**60), 2**60), min_size=2, max_size=6).map(lambda v: pd.array(v, "Int64")),
    st.lists(st.none() | st.integers(-99, 99), min_size=2, max_size=6).map(lambda v: np.array(v, float)),
    st.lists(st.floats(-9, 9) | st.integers(-9, 9).map(float), min_size=2, max_size=6).map(np.array),
    st.lists(st.booleans(), min_size=2, max_size=6),
)


def outcome_of(path: Path) -> object:
    """The digest of a catalogue, or what is wrong with it; the file's name left out."""
    try:
        return read_catalogue(str(path)).digest()
    except BadInput as error:
        return str(error).replace(str(path), "")


@given(st.data(), st.sampled_from(["id", "label", "sequence", "category", "path", "split"]))
def test_csv_and_parquet_of_one_table_are_one_catalogue(data: st.DataObject, column: str) -> None:
    values = pd.Series(data.draw(columns_of_names))
    table = pd.DataFrame({"path": [f"{row}.jpg" for row in range(len(values))], "label": "x", "split": "train"})
    table[column] = values
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for form in ("csv", "parquet", "semicolons", "quotes everywhere", "gzip of utf-16"):
            FORMS[form](table, Path(folder) / "df")
            outcomes.append(outcome_of(Path(folder) / "df"))
    assert len(set(outcomes)) == 1, outcomes


box = st.tuples(*[st.integers(-5, 400) | st.floats(-5, 400, width=32)] * 4) | st.just((None,) * 4)


@given(st.lists(box, min_size=1, max_size=5))
def test_boxes_of_csv_and_parquet_agree(boxes: list[tuple]) -> None:
    table = pd.DataFrame(boxes, columns=["x_1", "y_1", "x_2", "y_2"], dtype=float).assign(path="a.jpg")
    table["id"] = [str(row) for row in table.index]
    with tempfile.TemporaryDirectory() as folder:
        found = set()
        for form in ("csv", "parquet", "tabs"):
            FORMS[form](table, Path(folder) / "df")
            found.add(outcome_of(Path(folder) / "df"))
    assert len(found) == 1


ids = st.lists(words.filter(lambda text: not text.isspace()), min_size=3, max_size=6, unique=True)


@given(ids, st.data())
def test_trec_run_and_csv_of_any_ids_are_read_back(ids: list[str], data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        ids = [*ids, quote(ids[0], safe="") + "%", f"{ids[0]} x", f"{ids[0]}%20x"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pd.DataFrame({"id": ids, "path": "a.jpg"}).to_parquet(folder / "df.parquet")
        try:
            catalogue = read_catalogue(str(folder / "df.parquet"))
        except BadInput:
            return  # two of the ids are one number, or one stands for no value
        n = len(catalogue)
        items = np.array([np.roll(np.arange(n), -query)[1:] for query in range(n)], np.int64)
        distances = np.tile(np.arange(n - 1, dtype=np.float32) / 4, (n, 1))
        lists = CandidateLists(torch.arange(n), torch.from_numpy(items), torch.from_numpy(distances))
        table = candidates_table(lists, catalogue.ids)
        write_trec_run(folder / "run", [table], "mine")
        table.to_pandas().to_csv(folder / "lists.csv", index=False)
        table.to_pandas().drop(columns="rank").to_csv(folder / "lists.csv.gz")
        for file in ("run", "lists.csv", "lists.csv.gz"):
            for rows in (2, 1000):
                back = read_candidates(folder / file, catalogue, rows_per_batch=rows)
                assert candidates_table(back, catalogue.ids).equals(table)


@pytest.mark.parametrize("kind", ["int64", "int32", "uint64", "float64", "Int64", "str", "category"])
def test_list_ids_of_any_type_are_found_in_a_catalogue_of_numbers(kind: str, tmp_path: Path) -> None:
    numbers = [1, 20, 4006381333931]
    pd.DataFrame({"id": numbers, "path": ["a", "b", "c"]}).to_csv(tmp_path / "df.csv", index=False)
    catalogue = read_catalogue(str(tmp_path / "df.csv"))
    small = numbers[:2] if kind == "int32" else numbers
    query, gallery = pd.Series(small).astype(kind), pd.Series(small[::-1]).astype(kind)
    lists = pd.DataFrame({"query_id": query, "gallery_id": gallery, "distance": 0.5})[: len(small) // 2]
    for form in ("csv", "parquet"):
        FORMS[form](lists, tmp_path / "lists")
        found = candidates_table(read_candidates(tmp_path / "lists", catalogue), catalogue.ids)
        assert found["query_id"].to_pylist() == ["1"]
        assert found["gallery_id"].to_pylist() == [str(small[-1])]


def test_large_integers_do_not_pass_through_a_float(tmp_path: Path) -> None:
    numbers = [2**60, 2**60 + 1, 2**60 + 2]
    labels = pd.array([2**53, 2**53 + 1, None], "Int64")
    table = pd.DataFrame({"id": numbers, "path": ["a", "b", "c"], "label": labels})
    for form in ("csv", "parquet"):
        FORMS[form](table, tmp_path / "df")
        catalogue = read_catalogue(str(tmp_path / "df"))
        assert catalogue.ids.tolist() == [str(number) for number in numbers]
        assert catalogue.label_names.tolist() == [str(2**53), str(2**53 + 1)]
    lists = pa.table({"query_id": numbers[:1], "gallery_id": numbers[1:2], "score": [0.5]})
    FORMS["parquet"](lists.to_pandas(), tmp_path / "lists")
    found = candidates_table(read_candidates(tmp_path / "lists", catalogue), catalogue.ids)
    assert found["gallery_id"].to_pylist() == [str(2**60 + 1)]


def test_query_and_gallery_tables_may_not_spell_a_label_in_two_ways(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,path,label\na,a.jpg,7\nb,b.jpg,8\n")
    (tmp_path / "g.csv").write_text("id,path,label\nc,c.jpg,7.0\nd,d.jpg,x\n")
    with pytest.raises(
        BadInput, match=r"label '7' \(row 1 of queries .*q.csv\) and '7.0' \(row 1 of gallery .*g.csv\)"
    ):
        read_query_gallery(str(tmp_path / "q.csv"), str(tmp_path / "g.csv"))
    (tmp_path / "g.csv").write_text("id,path,label\nc,c.jpg,7.0\nd,d.jpg,\n")
    catalogue = read_query_gallery(str(tmp_path / "q.csv"), str(tmp_path / "g.csv"))
    assert catalogue.label_names.tolist() == ["7", "8"]


def test_labels_of_one_number_are_ordered_for_good(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text("path,label\na,1\nb,01\nc,2\nd,001\ne,-0\nf,0\n")
    assert read_catalogue(str(tmp_path / "df.csv")).label_names.tolist() == ["-0", "0", "001", "01", "1", "2"]


def test_index_columns_are_ignored_and_others_refused_in_lists(tmp_path: Path) -> None:
    (tmp_path / "df.csv").write_text("path\na\nb\n")
    catalogue = read_catalogue(str(tmp_path / "df.csv"))
    for header in ("", "Unnamed: 0", "index", "level_0", "__index_level_0__"):
        (tmp_path / "lists.csv").write_text(f"{header},query_id,gallery_id,distance\n9,a,b,1\n")
        assert read_candidates(tmp_path / "lists.csv", catalogue).items.tolist() == [[1]]
    (tmp_path / "lists.csv").write_text("similarity,query_id,gallery_id,distance\n9,a,b,1\n")
    with pytest.raises(BadInput, match=r"columns .*'similarity'"):
        read_candidates(tmp_path / "lists.csv", catalogue)
