"""Grades of pairs, from every form in which they come."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_catalogue import EXTRACTOR, make_catalogue

from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.data.judgement_files import read_judgements
from distributed_rerank.data.judgements import Judgements
from distributed_rerank.data.relevance import are_relevant, count_relevant
from distributed_rerank.data.texts import Texts
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.run import evaluate

QUERIES, GALLERY = Texts(["01", "1", "q"]), Texts(["a", "b", "c d"])
ROWS = [("01", "a", 1), ("01", "b", 0), ("1", "b", 2), ("q", "c d", -1)]


def read(path: Path) -> Judgements:
    return read_judgements(str(path), QUERIES, GALLERY)


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    """The same grades in every form; an id with a blank cannot be in qrels."""
    table = pd.DataFrame(ROWS, columns=["query_id", "gallery_id", "relevance"])
    table.to_parquet(tmp_path / "grades.parquet")
    table.to_csv(tmp_path / "grades.csv", index=False, sep=";")
    beir = table.rename(columns={"query_id": "query-id", "gallery_id": "corpus-id", "relevance": "score"})
    beir.iloc[::-1].to_csv(tmp_path / "test.tsv", index=False, sep="\t")
    (tmp_path / "grades.gz").write_bytes(gzip.compress(table.to_csv().encode("utf-8-sig")))
    return {path.name: path for path in tmp_path.iterdir()}


def test_every_form_gives_the_same_grades(forms: dict[str, Path]) -> None:
    found = {name: read(path) for name, path in forms.items()}
    assert len({grades.digest() for grades in found.values()}) == 1
    for grades in found.values():
        parts = [part.tolist() for part in grades.pairs(Texts(["01", "1", "a", "b", "c d", "q"]))]
        assert set(zip(*parts, strict=True)) == {(0, 2, 1), (0, 3, 0), (1, 3, 2), (5, 4, -1)}


def test_qrels_of_trec_have_no_header(tmp_path: Path) -> None:
    found = read(write(tmp_path / "qrels", "01 0 a 1\n01\t0\tb\t0\n\n1 0 b 2\n"))
    assert found.table.to_pydict() == {
        "query_id": ["01", "01", "1"], "gallery_id": ["a", "b", "b"], "relevance": [1, 0, 2]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query_id,gallery_id,relevance\n2,a,1\n", "1 ids are no is_query rows of the catalogue's split, first '2'"),
        ("query_id,gallery_id,relevance\n1,z,1\n", "1 ids are no is_gallery rows .* first 'z'"),
        ("query_id,gallery_id,relevance\n1,,1\n", "1 ids are no is_gallery rows .* first None"),
        ("query_id,gallery_id,relevance\n1,a,1\n1,a,0\n", "1 pairs have two grades, first query '1' with 'a'"),
        ("query_id,gallery_id,relevance\n1,a,yes\n", "row 1 has the relevance 'yes'; write 1, 0 or -1"),
        ("query_id,gallery_id,relevance\n1,a,0\n", "no pair is relevant"),
        ("query_id,relevance\n1,1\n", "has no column gallery_id"),
        ("1 0 a 1\n1 0 b\n", "line 2 has 3 fields; qrels have four"),
    ],
)
def test_grades_that_cannot_be_are_refused_with_their_place(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        read(write(tmp_path / "grades.csv", content))


def test_grades_that_say_what_the_labels_say_give_the_same_figures(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 24)
    gallery = catalogue.gallery_items
    rows = [
        (catalogue.ids[int(query)], catalogue.ids[int(item)], 1)
        for query in catalogue.query_items
        for item in gallery[are_relevant(catalogue, int(query), gallery)]
        if query != item
    ]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "relevance"]).to_csv(tmp_path / "grades.csv", index=False)
    judged = replace(catalogue, judgements=read_judgements(str(tmp_path / "grades.csv"), *catalogue.roles()))
    assert judged.digest() != catalogue.digest()
    np.testing.assert_array_equal(count_relevant(judged), count_relevant(catalogue))
    first = FirstStageConfig(extractor=EXTRACTOR, n_items=10)
    by_label, by_grade = (evaluate(c, first, tmp_path / n) for c, n in ((catalogue, "labels"), (judged, "grades")))
    for key in ("n_queries", "first_stage", "baselines", "ceiling"):
        assert by_label.get(key) == by_grade.get(key), key
    assert by_grade["suspects"] == []
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / n / "per_query.parquet") for n in ("labels", "grades")))
