"""Inputs as people have them, given to the commands themselves: the right figures, or one line that names the cause."""

import bz2
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from job_files import EXTRACTOR
from table_forms import FORMS

from distributed_rerank import extraction, retrieval

ROLES = "validation,1,1"
HEAD = "id,path,label,split,is_query,is_gallery\n"
FOUR = HEAD + "".join(f"{id},{id}.jpg,{label},{ROLES}\n" for id, label in zip("abcd", "xxyy", strict=True))
"""Two labels of two images."""
WRONG_FIRST = "query_id,gallery_id,distance\na,c,.1\na,b,.2\nb,d,.1\nb,a,.2\nc,a,.1\nc,d,.2\nd,b,.1\nd,c,.2\n"
"""The image of the other label before the one of the same label."""
RIGHT_FIRST = "query_id,gallery_id,distance\na,b,.1\na,c,.2\nb,a,.1\nb,d,.2\nc,d,.1\nc,a,.2\nd,c,.1\nd,b,.2\n"

Measure = Callable[..., dict]
Refuse = Callable[..., str]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def measure(run_job: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Measure:
    """`measure(catalogue, lists, *flags)`: metrics.json of `evaluate`, and what it said; files may be given as text."""
    runs = iter(range(100))

    def run(catalogue: Path | str, lists: Path | str, *flags: object) -> dict:
        catalogue = written(tmp_path / "df.csv", catalogue) if isinstance(catalogue, str) else catalogue
        lists = written(tmp_path / "lists.csv", lists) if isinstance(lists, str) else lists
        out = tmp_path / f"out{next(runs)}"
        caplog.set_level(logging.INFO)
        caplog.clear()
        outcome = run_job(
            "evaluate", "--no-baselines", "--catalogue", catalogue, "--candidates", lists, "--out", out, *flags
        )
        assert outcome.code == 0, outcome.errors
        return json.loads((out / "metrics.json").read_text()) | {"out": out, "said": caplog.text}

    return run


@pytest.fixture
def refuse(run_job: Callable, tmp_path: Path) -> Refuse:
    """`refuse(catalogue, lists, *flags)`: the one line with which `evaluate` ends."""

    def run(catalogue: Path | str, lists: Path | str | None, *flags: object) -> str:
        catalogue = written(tmp_path / "df.csv", catalogue) if isinstance(catalogue, str) else catalogue
        lists = written(tmp_path / "lists.csv", lists) if isinstance(lists, str) else lists
        given = [] if lists is None else ["--candidates", lists]
        outcome = run_job(
            "evaluate", "--no-baselines", "--catalogue", catalogue, *given, "--out", tmp_path / "refused", *flags
        )
        assert outcome.code == 2, outcome.errors
        last = outcome.errors.strip().splitlines()[-1]
        assert last.startswith("error: "), outcome.errors
        assert not (tmp_path / "refused").exists()
        return last

    return run


def figures(metrics: dict) -> tuple[float, float]:
    return metrics["first_stage"]["cmc@1"], metrics["first_stage"]["map@10"]


def relabelled(*labels: str) -> str:
    return HEAD + "".join(f"{id},{id}.jpg,{label},{ROLES}\n" for id, label in zip("abcd", labels, strict=True))


@pytest.mark.parametrize(
    ("first", "second"), [("01", "1"), ("1e5", "100000"), ("-0", "0"), ("0x1", "1"), ("7", "7.5"), ("1", "+1"),
                          ("4006381333931", "04006381333931"), (str(2**60), str(2**60 + 1)), ("a", "A")]
)  # fmt: skip
def test_labels_that_look_like_one_number_stay_two(first: str, second: str, measure: Measure, tmp_path: Path) -> None:
    catalogue = relabelled(first, first, second, second)
    found = measure(catalogue, WRONG_FIRST)
    assert figures(found) == (0, 0.5)
    per_query = pd.read_parquet(found["out"] / "per_query.parquet")
    assert per_query["label"].tolist() == [first, first, second, second]
    pd.read_csv(tmp_path / "df.csv", dtype=str).to_parquet(tmp_path / "df.parquet")
    assert figures(measure(tmp_path / "df.parquet", WRONG_FIRST)) == (0, 0.5)


def test_sequences_and_ids_that_look_like_one_number_stay_two(measure: Measure) -> None:
    with_sequences = "id,path,label,split,is_query,is_gallery,sequence\n"
    for id, label, sequence in (("1", "x", "01"), ("01", "x", "1"), ("2", "y", "2"), ("02", "y", "02")):
        with_sequences += f"{id},{id}.jpg,{label},{ROLES},{sequence}\n"
    lists = "query_id,gallery_id,distance\n1,01,.1\n01,1,.1\n2,02,.1\n02,2,.1\n"
    assert figures(measure(with_sequences, lists)) == (1, 1)


def test_floats_of_pandas_are_the_integers_they_were(measure: Measure, tmp_path: Path) -> None:
    catalogue = relabelled("7.0", "7.0", "8.0", "8.0")
    found = measure(catalogue, RIGHT_FIRST)
    assert pd.read_parquet(found["out"] / "per_query.parquet")["label"].tolist() == ["7", "7", "8", "8"]
    pd.read_csv(tmp_path / "df.csv").to_parquet(tmp_path / "df.parquet")
    again = measure(tmp_path / "df.parquet", RIGHT_FIRST)
    assert pd.read_parquet(again["out"] / "per_query.parquet")["label"].tolist() == ["7", "7", "8", "8"]


def test_one_number_in_two_spellings_is_refused_with_both_rows(refuse: Refuse) -> None:
    line = refuse(relabelled("7", "7", "x", "7.0"), WRONG_FIRST)
    assert "label '7' (row 1) and '7.0' (row 4) are the same number in two spellings" in line


def test_float_ids_are_found_from_csv_and_parquet(run_job: Callable, models: dict, tmp_path: Path) -> None:
    written(tmp_path / "df.csv", "id,path\n1.0,a.jpg\n2.0,b.jpg\n")
    pd.read_csv(tmp_path / "df.csv").to_parquet(tmp_path / "df.parquet")
    lists = pd.DataFrame({"query_id": [1, 2], "gallery_id": [2, 1], "distance": [0.1, 0.1]})
    lists.to_csv(tmp_path / "whole.csv", index=False)
    lists.astype(float).to_csv(tmp_path / "float.csv", index=False)
    lists.astype(float).to_parquet(tmp_path / "float.parquet", index=False)
    results = set()
    for catalogue in ("df.csv", "df.parquet"):
        for name in ("whole.csv", "float.csv", "float.parquet"):
            out = tmp_path / f"{catalogue}-{name}"
            outcome = run_job(
                "rerank", "--model", models["identity"], "--chain", "first_stage", "--catalogue", tmp_path / catalogue,
                "--candidates", tmp_path / name, "--out", out,
            )  # fmt: skip
            assert outcome.code == 0, outcome.errors
            found = pd.read_parquet(out / "reranked.parquet")
            results.add(tuple(zip(found["query_id"], found["gallery_id"], strict=True)))
    assert results == {(("1", "2"), ("2", "1"))}


def test_list_that_lost_leading_zeros_is_told_so(refuse: Refuse) -> None:
    catalogue = HEAD + "".join(f"{id},{id}.jpg,{label},{ROLES}\n" for id, label in (("007", "x"), ("008", "x")))
    line = refuse(catalogue, "query_id,gallery_id,distance\n7,8,.1\n8,7,.1\n")
    assert "2 ids are not in" in line
    assert "'7' may be '007' without its zeros" in line


SALT = ["Salt, fine", "Salt, fine", "Salt, coarse", "Salt, coarse"]


def test_comma_in_a_label_is_refused_with_its_rows(refuse: Refuse, measure: Measure) -> None:
    head = "id,path,split,is_query,is_gallery,label\n"
    rows = [f"{id},{id}.jpg,{ROLES},{label}\n" for id, label in zip("abcd", SALT, strict=True)]
    line = refuse(head + "".join(rows), WRONG_FIRST)
    assert "rows 1, 2, 3, 4 have 7 fields, where the header has 6" in line
    assert "quotes" in line
    quoted = [row.replace("Salt, ", '"Salt, ').replace("\n", '"\n') for row in rows]
    assert figures(measure(head + "".join(quoted), WRONG_FIRST)) == (0, 0.5)
    line = refuse(head + "".join(quoted[:2]) + "c,c.jpg,validation,1\n" + quoted[3], WRONG_FIRST)
    assert "row 3 has 4 fields, where the header has 6" in line


def test_short_and_long_rows_of_lists_are_refused(refuse: Refuse) -> None:
    assert "row 2 has 2 fields, where the header has 3" in refuse(FOUR, "query_id,gallery_id,distance\na,b,.1\nb,a\n")
    line = refuse(FOUR, "query_id,gallery_id,distance\na,b,0,1\nb,a,0,2\n")
    assert "rows 1, 2 have 4 fields, where the header has 3" in line


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_gives_the_same_figures(form: str, measure: Measure, tmp_path: Path) -> None:
    catalogue, lists = (tmp_path / f"{name}.of_no_known_kind" for name in ("catalogue", "lists"))
    written(tmp_path / "df.csv", FOUR.replace("x", "é, 01").replace("a,a.jpg,é, 01", 'a,a.jpg,"é, 01"'))
    table = pd.DataFrame({
        "id": list("abcd"), "path": [f"{id}.jpg" for id in "abcd"], "label": ["é; 01"] * 2 + ["1 | Ω"] * 2,
        "split": "validation", "is_query": True, "is_gallery": True, "sequence": [1, None, None, 3],
    })  # fmt: skip
    FORMS[form](table, catalogue)
    rows = [row.split(",") for row in WRONG_FIRST.splitlines()[1:]]
    FORMS[form](pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"]), lists)
    found = measure(catalogue, lists)
    assert figures(found) == (0, 0.5)
    assert pd.read_parquet(found["out"] / "per_query.parquet")["label"].tolist() == table["label"].tolist()


NO_TABLES: dict[str, tuple] = {
    "Latin-1": (lambda text: text.replace("a,", "é,", 1).encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)", "UTF-8"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-le"), "zero bytes", "save it as UTF-8"),
    "Excel workbook": (lambda _: b"PK\x03\x04 and more", "Excel workbook", "save it as CSV"),
    "JSON": (lambda _: b'[{"id": "a"}]', "JSON", "save it as CSV or Parquet"),
    "Feather": (lambda _: b"ARROW1\x00\x00 and more", "Arrow or Feather", "save it as Parquet"),
    "cut off gzip": (lambda text: gzip.compress(text.encode())[:40], "Compressed file ended", "check the path"),
    "bzip2": (lambda text: bz2.compress(text.encode()), "bzip2", "unpack it"),
    "empty": (lambda _: b"", "empty", "check the path"),
    "open quote": (lambda text: text.replace("a,", '"a,', 1).encode(), "quotes do not match from row 1 on", "double"),
    "text after a quote": (lambda text: text.replace("a,", '"a"b,', 1).encode(), "quotes do not match from row 1", ""),
    "half Parquet": (lambda _: b"PAR1 half", "Parquet", ""),
}
"""How a text is spoilt, and words of the error."""


@pytest.mark.parametrize("case", NO_TABLES)
def test_file_that_is_no_table_is_named(case: str, refuse: Refuse, tmp_path: Path) -> None:
    spoil, *words = NO_TABLES[case]
    catalogue, lists = (
        written(tmp_path / f"{name}.bad", spoil(text)) for name, text in (("df", FOUR), ("lists", RIGHT_FIRST))
    )
    for path, line in ((catalogue, refuse(catalogue, RIGHT_FIRST)), (lists, refuse(FOUR, lists))):
        assert all(word in line for word in [*words, str(path)]), line


@pytest.mark.parametrize(("separator", "shown"), [(";", "';'"), ("\t", "'\\t'")])
def test_cells_with_the_separator_are_refused_in_other_separators_too(
    separator: str, shown: str, refuse: Refuse
) -> None:
    line = refuse(FOUR.replace(",", separator).replace(f"x{separator}", f"x{separator}z{separator}", 1), WRONG_FIRST)
    assert "row 1 has 7 fields, where the header has 6" in line
    assert f"contain {shown}" in line


def test_decimal_commas_are_named(refuse: Refuse) -> None:
    assert "first in row 1 ('0,1'; write a decimal point)" in refuse(
        FOUR, WRONG_FIRST.replace(",", ";").replace(".", "0,")
    )


WORDS = [
    "NULL",
    "\\N",
    "<NA>",
    "nan",
    "NaN",
    "None",
    "NA",
    "N/A",
    "null",
    "n.a.",
    "(null)",
    "#NAME?",
    "#REF!",
]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_word_for_no_value_is_no_label(word: str, form: str, refuse: Refuse, tmp_path: Path) -> None:
    rows = [
        (id, f"{id}.jpg", label, "validation", 1, 1) for id, label in zip("abcd", ["x", "x", word, word], strict=True)
    ]
    FORMS[form](pd.DataFrame(rows, columns=HEAD.strip().split(",")), tmp_path / "table")
    line = refuse(tmp_path / "table", WRONG_FIRST)
    assert (
        f"no label in validation rows ({word!r} stands for no value); give one or remove the rows (rows 3, 4)" in line
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [("x ", "x"), ("x", " x"), ("x\u200b", "x"), ("x\xa0", "x"), ("x\t", "x"), ("x\u200b1", "x1"), ("e\u0301", "\xe9"),
     ("x ", "x  "), ("a\xa0b", "a b"), ("a\u2009b", "a b"), ("\u65e5\u672c", "\u65e5\u672c ")],
)  # fmt: skip
def test_names_that_look_the_same_are_refused_with_both_rows(first: str, second: str, refuse: Refuse) -> None:
    line = refuse(relabelled(first, second, "y", "y"), RIGHT_FIRST)
    assert "look the same; write one of them in all rows" in line
    assert (
        f"label {second!a} (row 2) and {first!a} (row 1)" in line or f"{first!a} (row 1) and {second!a} (row 2)" in line
    )
    ids = HEAD + "".join(f"{id},{row}.jpg,x,{ROLES}\n" for row, id in enumerate((first, second, "c", "d")))
    assert "id " in (line := refuse(ids, RIGHT_FIRST))
    assert "look the same" in line


@pytest.mark.parametrize(
    ("first", "second"), [("x", "X"), ("a b", "a  b"), ("m\xb2", "m2"), ("\xe9", "\xe8"), ("o", "\u043e")]
)
def test_names_that_differ_to_the_eye_or_by_their_letters_stay_two(first: str, second: str, measure: Measure) -> None:
    found = measure(relabelled(first, second, first, second), RIGHT_FIRST)
    assert figures(found)[0] == 0


@pytest.mark.parametrize("separator", [":", "~", "^", " ", "\x01", "::", " , "])
def test_other_separators_are_named(separator: str, refuse: Refuse) -> None:
    expected = f"{separator!r} separates its columns; write one of , ; | and tabs"
    assert expected in refuse(FOUR.replace(",", separator), RIGHT_FIRST)
    assert expected in refuse(FOUR, RIGHT_FIRST.replace(",", separator))


@pytest.mark.parametrize("above", ["sep=;", "# made by hand", "Photos of 2024;;;", "a comment\nof two lines"])
def test_lines_above_the_header_are_named(above: str, refuse: Refuse) -> None:
    number = 2 + above.count("\n")
    expected = f"line {number} looks like the header; remove the lines above it"
    assert expected in refuse(f"{above}\n{FOUR.replace(',', ';')}", RIGHT_FIRST)
    assert expected in refuse(FOUR, f"{above}\n{RIGHT_FIRST}")


@pytest.mark.parametrize("name", ["Sequence", " sequence", "SEQUENCE ", "\ufeffsequence"])
def test_column_in_another_spelling_is_told(name: str, measure: Measure) -> None:
    header, *rows = FOUR.splitlines()
    sequences = [f"{row},s" for row in rows]
    assert figures(measure("\n".join([f"{header},{name}", *sequences]), RIGHT_FIRST)) == (1, 1)
    words = f"COLUMN {name!r} IS NOT READ; call it 'sequence' where that is meant"
    assert words in measure("\n".join([f"{header},{name}", *sequences]), RIGHT_FIRST)["said"]
    both = measure("\n".join([f"{header},sequence,{name}", *(f"{row},{row[0]},s" for row in rows)]), RIGHT_FIRST)
    assert "IS NOT READ" not in both["said"]


def test_lists_of_one_value_are_told(measure: Measure) -> None:
    ids = [f"p{number}" for number in range(7)]
    table = HEAD + "".join(f"{id},{id}.jpg,{number % 2},{ROLES}\n" for number, id in enumerate(ids))
    pairs = [(query, item) for query in ids for item in ids if item != query]
    words = "ALL CANDIDATES OF A QUERY HAVE THE SAME"
    for value in ("distance", "score"):
        head = f"query_id,gallery_id,{value}"
        flat = f"{head}\n" + "".join(f"{query},{item},1\n" for query, item in pairs)
        assert f"{words} {value.upper()}" in measure(table, flat)["said"]
        ranked = f"{head},rank\n" + "".join(f"{query},{item},1,{n}\n" for n, (query, item) in enumerate(pairs))
        assert words not in measure(table, ranked)["said"]
    assert words not in measure(FOUR, RIGHT_FIRST.replace(".2", ".1"))["said"], "lists of two say little"


def test_a_folder_instead_of_a_table_is_told_so(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is a folder; name the table in it" in refuse(tmp_path / "folder", RIGHT_FIRST)
    assert "holds no Parquet files of candidates" in refuse(FOUR, tmp_path / "folder")


def test_one_list_of_similarities_among_distances_is_refused(refuse: Refuse, measure: Measure) -> None:
    ids = [f"p{number}" for number in range(8)]
    table = HEAD + "".join(f"{id},{id}.jpg,{number % 2},{ROLES}\n" for number, id in enumerate(ids))
    lists = [(query, item, 1 + rank) for query in ids for rank, item in enumerate(i for i in ids if i != query)]
    turned = [(query, item, 9 - value if query == "p3" else value) for query, item, value in lists]
    head = "query_id,gallery_id,distance\n"
    measure(table, head + "".join(f"{q},{i},{v}\n" for q, i, v in lists))
    line = refuse(table, head + "".join(f"{q},{i},{v}\n" for q, i, v in turned))
    assert "the distance of query 'p3' runs the other way than that of the others" in line
    ranked = "".join(f"{q},{i},{v},{v}\n" for q, i, v in turned)
    measure(table, head.replace("\n", ",rank\n") + ranked)


def test_word_for_no_value_is_no_id_path_or_sequence(refuse: Refuse, measure: Measure) -> None:
    assert "empty id ('NULL' stands for no value)" in refuse(FOUR.replace("a,a.jpg", "NULL,a.jpg"), WRONG_FIRST)
    assert "empty path" in refuse(FOUR.replace("a,a.jpg", "a,nan"), WRONG_FIRST)
    assert "1 rows without query_id or gallery_id, first row 2" in refuse(FOUR, RIGHT_FIRST.replace("a,c", "a,None"))
    head, *rows = FOUR.splitlines()
    in_no_sequence = "\n".join([f"{head},sequence", *(f"{row},NULL" for row in rows)])
    found = measure(in_no_sequence, RIGHT_FIRST)
    assert figures(found) == (1, 1)
    assert "'NULL' in column sequence counts as empty" in found["said"]


def test_repeated_columns_are_refused_where_they_matter(refuse: Refuse, measure: Measure) -> None:
    head, *rows = FOUR.splitlines()
    twice = "\n".join([f"{head},label", *(f"{row},7" for row in rows)])
    assert "2 columns are called 'label'; keep one of them" in refuse(twice, RIGHT_FIRST)
    notes = "\n".join([f"{head},note,note", *(f"{row},7,8" for row in rows)])
    assert figures(measure(notes, RIGHT_FIRST)) == (1, 1)
    lists = RIGHT_FIRST.replace("distance", "distance,distance").replace(".1", ".1,.3").replace(".2", ".2,.1")
    assert "2 columns are called 'distance'; keep one of them" in refuse(FOUR, lists)


def test_repeated_columns_of_parquet_are_treated_alike(refuse: Refuse, measure: Measure, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(pd.read_csv(written(tmp_path / "df.csv", FOUR)))
    pq.write_table(table.append_column("label", table["label"]), tmp_path / "twice.parquet")
    assert "2 columns are called 'label'; keep one of them" in refuse(tmp_path / "twice.parquet", RIGHT_FIRST)
    notes = table.append_column("note", table["path"]).append_column("note", pa.array([[1], [2], [3], [4]]))
    pq.write_table(notes, tmp_path / "notes.parquet")
    assert figures(measure(tmp_path / "notes.parquet", RIGHT_FIRST)) == (1, 1)
    lists = pa.Table.from_pandas(pd.read_csv(written(tmp_path / "lists.csv", RIGHT_FIRST)))
    pq.write_table(lists.append_column("distance", lists["distance"]), tmp_path / "lists.parquet")
    assert "2 columns are called 'distance'; keep one of them" in refuse(FOUR, tmp_path / "lists.parquet")


def test_column_of_a_type_that_is_no_text_is_named(refuse: Refuse, tmp_path: Path) -> None:
    table = pd.read_csv(written(tmp_path / "df.csv", FOUR))
    table.assign(sequence=pd.Timestamp("2024-01-02")).to_parquet(tmp_path / "df.parquet")
    assert "column 'sequence' has the type timestamp" in refuse(tmp_path / "df.parquet", RIGHT_FIRST)
    table.assign(label=[["x"], ["x"], ["y"], ["y"]]).to_parquet(tmp_path / "df.parquet")
    assert "column 'label' has the type list" in refuse(tmp_path / "df.parquet", RIGHT_FIRST)


@pytest.mark.parametrize(
    "corners", ["0.0,0.0,1.0,1.0", "0,0,1,1", "0.1,0.1,0.9,0.9", "0.25,0.0,0.75,1.0", "-0.01,0,1.02,1"]
)
def test_boxes_in_shares_are_refused(corners: str, run_job: Callable, tmp_path: Path) -> None:
    written(tmp_path / "df.csv", f"id,path,x_1,y_1,x_2,y_2\na,a.png,1,1,20,20\nb,b.png,{corners}\nc,c.png,,,,\n")
    outcome = run_job("embed", "--catalogue", tmp_path / "df.csv", "--out", tmp_path / "out", *EXTRACTOR)
    assert outcome.code == 2
    assert "box corners between 0 and 1 look like shares of the image; pixels are needed" in outcome.errors
    assert outcome.errors.rstrip().endswith("(row 2)")
    assert not (tmp_path / "out").exists()


def test_labels_in_both_splits_are_refused_unless_allowed(
    run_job: Callable, refuse: Refuse, measure: Measure, tmp_path: Path
) -> None:
    shared = FOUR + "e,e.jpg,x,train,,\nf,f.jpg,x,train,,\n"
    words = "1 of 2 validation labels are train labels too: 'x'"
    line = refuse(shared, RIGHT_FIRST)
    assert words in line
    assert "--allow-shared-labels" in line
    found = measure(shared, RIGHT_FIRST, "--allow-shared-labels")
    assert figures(found) == (1, 1)
    assert words in found["said"]
    for job in ("train", "train_extractor"):
        outcome = run_job(job, "--catalogue", tmp_path / "df.csv", "--out", tmp_path / job, *EXTRACTOR)
        assert (outcome.code, words in outcome.errors) == (2, True), outcome.errors
        assert not (tmp_path / job).exists()
    assert figures(measure(shared.replace("x,train", "z,train"), RIGHT_FIRST)) == (1, 1)


def test_queries_without_a_list(refuse: Refuse, measure: Measure) -> None:
    lists = "query_id,gallery_id,distance\na,b,.1\na,c,.2\n"
    line = refuse(FOUR, lists)
    assert "3 of 4 queries have no list: 'b', 'c', 'd'" in line
    assert "--missing-lists" in line
    assert "3 of 4 queries have no list" in refuse(FOUR, lists, "--missing-lists", "error")
    as_misses = measure(FOUR, lists, "--missing-lists", "miss")
    assert (as_misses["n_queries"], as_misses["n_without_list"], figures(as_misses)[0]) == (4, 3, 0.25)
    left_out = measure(FOUR, lists, "--missing-lists", "leave_out")
    assert (left_out["n_queries"], left_out["n_without_list"], figures(left_out)[0]) == (1, 3, 1)
    for found in (as_misses, left_out):
        assert "3 queries without a list" in found["said"]
        assert "Queries without a list</dt><dd>3<" in (found["out"] / "report.html").read_text()
    assert measure(FOUR, RIGHT_FIRST)["n_without_list"] == 0


def test_missing_lists_flag_without_lists_is_refused(refuse: Refuse) -> None:
    assert "--missing-lists has no effect" in refuse(FOUR, None, *EXTRACTOR, "--missing-lists", "miss")


def test_reranking_leaves_queries_without_a_list_alone_unless_they_are_given(
    run_job: Callable, models: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a table of queries any image may be one, and most have no list."""
    common = [
        "--model",
        models["identity"],
        "--chain",
        "first_stage",
        "--catalogue",
        written(tmp_path / "df.csv", FOUR),
    ]
    common += ["--candidates", written(tmp_path / "lists.csv", "query_id,gallery_id,distance\na,b,.1\n")]
    caplog.set_level(logging.INFO)
    outcome = run_job("rerank", *common, "--out", tmp_path / "any")
    assert outcome.code == 0, outcome.errors
    assert "3 of 4 queries have no list" in caplog.text
    queries = ["--query-catalogue", written(tmp_path / "queries.csv", "id,path,label\na,a.jpg,x\nq,q.jpg,y\n")]
    refused = run_job("rerank", *common, *queries, "--out", tmp_path / "given")
    assert refused.code == 2
    assert "1 of 2 queries have no list: 'q'" in refused.errors
    outcome = run_job("rerank", *common, *queries, "--missing-lists", "leave_out", "--out", tmp_path / "given")
    assert outcome.code == 0, outcome.errors
    for name in ("any", "given"):
        assert pd.read_parquet(tmp_path / name / "reranked.parquet")["query_id"].tolist() == ["a"]


def test_padding_of_faiss_is_left_out_with_a_word(measure: Measure, tmp_path: Path) -> None:
    padded = WRONG_FIRST + "".join(f"{id},-1,3.4028235e+38\n" for id in "abcc")
    found = measure(FOUR, padded)
    assert figures(found) == (0, 0.5)
    assert "4 rows with gallery_id -1 are padding and left out" in found["said"]
    alone = measure(FOUR, RIGHT_FIRST.replace("d,c,.1\nd,b,.2\n", "d,-1,inf\n"))
    assert (alone["n_queries"], alone["n_without_list"], figures(alone)[0]) == (4, 0, 0.75)
    numbered = pd.read_csv(tmp_path / "df.csv").assign(id=[1, 2, 3, 4])
    numbered.to_parquet(tmp_path / "df.parquet")
    numbers = dict(zip("abcd", [1, 2, 3, 4], strict=True))
    lists = pd.read_csv(written(tmp_path / "right.csv", RIGHT_FIRST)).replace(numbers)
    scores = lists.assign(score=-lists.pop("distance"))
    scores.loc[len(scores)] = [1, -1, -3.4028235e38]
    scores.astype({"query_id": int, "gallery_id": int}).to_parquet(tmp_path / "lists.parquet")
    assert figures(measure(tmp_path / "df.parquet", tmp_path / "lists.parquet")) == (1, 1)


def test_minus_one_that_is_an_id_is_no_padding(measure: Measure) -> None:
    catalogue = FOUR.replace("b,b.jpg", "-1,b.jpg")
    assert figures(measure(catalogue, RIGHT_FIRST.replace("b,", "-1,"))) == (1, 1)


def test_padding_that_was_looked_up_is_refused(refuse: Refuse) -> None:
    line = refuse(FOUR, RIGHT_FIRST.replace("a,c,.2", "a,d,3.4028235e+38"))
    assert "first in row 2" in line
    assert "faiss writes for no neighbour" in line


def test_similarity_called_distance_is_refused(refuse: Refuse, measure: Measure) -> None:
    best_first = "query_id,gallery_id,distance\na,b,.95\na,c,.4\na,d,.2\nb,a,.95\nb,d,.5\nb,c,.3\nc,d,.9\nc,b,.3\n"
    best_first += "c,a,.1\nd,c,.9\nd,a,.4\n"
    line = refuse(FOUR, best_first)
    assert "the distances fall from the first row to the last" in line
    assert "call the column score" in line
    assert figures(measure(FOUR, best_first.replace("distance", "score"))) == (1, 1)
    line = refuse(FOUR, RIGHT_FIRST.replace("distance", "score"))
    assert "the scores grow from the first row to the last" in line
    assert "call the column distance" in line
    trec = "".join("{} Q0 {} 1 {} run\n".format(*row.split(",")) for row in RIGHT_FIRST.splitlines()[1:])
    assert "in a TREC run write them negative" in refuse(FOUR, trec)


def test_shuffled_similarities_are_known_by_the_query_itself(refuse: Refuse, measure: Measure) -> None:
    rows = [f"{id},{id},1\n" for id in "abcd"] + [
        "a,c,.2\n",
        "a,b,.9\n",
        "b,d,.1\n",
        "b,a,.9\n",
        "c,d,.7\n",
        "d,c,.7\n",
    ]
    assert "call the column score" in refuse(FOUR, "query_id,gallery_id,distance\n" + "".join(reversed(rows)))
    assert figures(measure(FOUR, "query_id,gallery_id,score\n" + "".join(reversed(rows)))) == (1, 1)
    sorted_worst_first = "query_id,gallery_id,distance\na,c,.2\na,b,.1\na,a,0\nb,d,.2\nb,a,.1\nb,b,0\nc,d,.1\nd,c,.1\n"
    assert figures(measure(FOUR, sorted_worst_first)) == (1, 1)


STRANGE_IDS = {
    "boxes": None,
    "spaces": ["left shoe", "right shoe", "left hat", "right hat"],
    "percent signs": ["50%off", "100%25", "a%20b", "a b"],
    "commas and quotes": ["a,b", 'a"b', "'", '"a, b"'],
    "all scripts": ["é", "\u00a0x", "日本 語", "😀"],
    "like other formats": ["[", "{", "ORC", "ARROW1"],
    "like other columns": ["query_id", "Q0", "1", "1.0 Q0"],
}


@pytest.mark.parametrize("kind", STRANGE_IDS)
def test_own_trec_run_is_read_back(kind: str, measure: Measure, tmp_path: Path) -> None:
    ids = STRANGE_IDS[kind]
    table = pd.DataFrame({"path": ["a.jpg", "a.jpg", "b.jpg", "b.jpg"], "label": list("xxyy"), "split": "validation"})
    table = table.assign(is_query=1, is_gallery=1)
    if ids is None:
        table = table.assign(x_1=[1, 11, 1, 11], y_1=1, x_2=[9, 19, 9, 19], y_2=9)
        corners = table[["x_1", "y_1", "x_2", "y_2"]].astype(str).agg(",".join, axis=1)
        ids = [f"{path}#{box}" for path, box in zip(table["path"], corners, strict=True)]
    else:
        table = table.assign(id=ids)
    table.to_csv(tmp_path / "df.csv", index=False)
    lists = pd.read_csv(written(tmp_path / "wrong.csv", WRONG_FIRST)).replace(dict(zip("abcd", ids, strict=True)))
    lists.to_csv(tmp_path / "lists.csv", index=False)
    first = measure(tmp_path / "df.csv", tmp_path / "lists.csv", "--trec", tmp_path / "trec")
    again = measure(tmp_path / "df.csv", tmp_path / "trec" / "first_stage.trec", "--trec", tmp_path / "trec2")
    assert figures(first) == figures(again) == (0, 0.5)
    for name in ("first_stage.trec", "qrels.trec"):
        assert (tmp_path / "trec" / name).read_bytes() == (tmp_path / "trec2" / name).read_bytes()


def test_trec_runs_of_others_are_read(measure: Measure, refuse: Refuse) -> None:
    ids = {"a": "a,1", "b": "b%20x", "c": 'c"', "d": "d"}
    catalogue = HEAD + "".join(
        f'"{ids[id].replace(chr(34), chr(34) * 2)}",{id}.jpg,{label},{ROLES}\n'
        for id, label in zip("abcd", "xxyy", strict=True)
    )
    rows = [row.split(",") for row in RIGHT_FIRST.splitlines()[1:]]
    run = "".join(f"{ids[q]} Q0\t{ids[g]}  1 -{d} tag,of,others\n" for q, g, d in rows)
    assert figures(measure(catalogue, run)) == (1, 1)
    assert figures(measure(catalogue, "\n" + run.replace(" Q0", " 0").replace("\n", "\r\n"))) == (1, 1)
    line = refuse(catalogue, run + "d Q0 c 1 -.5\n")
    assert "line 9 has 5 fields; a TREC run has 6" in line


@pytest.mark.parametrize("has_sequence", [False, True])
def test_nothing_to_measure_is_told_before_any_image_is_read(
    has_sequence: bool, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("images would have been read")

    monkeypatch.setattr(extraction, "embed", never)
    monkeypatch.setattr(retrieval, "retrieve", never)
    if has_sequence:
        head, *rows = FOUR.splitlines()
        line = refuse("\n".join([f"{head},sequence", *(f"{row},cam1" for row in rows)]), None, *EXTRACTOR)
        assert "all gallery items of a query's label are of its own sequence" in line
    else:
        line = refuse(relabelled("w", "x", "y", "z"), None, *EXTRACTOR)
        assert "4 have no other gallery item of their label; check label and is_gallery" in line
    assert "none of the 4 queries has a relevant gallery item" in line


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_embeddings_with_float_ids_and_an_index_are_found(form: str, run_job: Callable, tmp_path: Path) -> None:
    table = pd.read_csv(written(tmp_path / "x.csv", FOUR)).assign(id=[1.0, 2.0, 3.0, 4.0])
    FORMS[form](table, tmp_path / "table")
    embeddings = pd.DataFrame({"id": [1.0, 2.0, 3.0, 4.0], "embedding": [[0.0], [0.1], [1.0], [1.1]]})
    embeddings.set_index(pd.Index([3, 4, 5, 6])).to_parquet(tmp_path / "embeddings.parquet")
    out = tmp_path / "out"
    outcome = run_job(
        "evaluate", "--catalogue", tmp_path / "table", "--embeddings", tmp_path / "embeddings.parquet", "--out", out
    )
    assert outcome.code == 0, outcome.errors
    assert figures(json.loads((out / "metrics.json").read_text())) == (1, 1)


@pytest.mark.parametrize(
    ("second", "words"),
    [([0.0, 0.0], "1 EMBEDDINGS ARE ZERO, first that of 'b'"), ([1.0, 2.0], "ALL 4 IMAGES HAVE THE SAME EMBEDDING"),
     ([1.0, 2e18], "1 embeddings are not finite or longer than 2^60, first that of 'b'")],
)  # fmt: skip
def test_embeddings_of_others_that_tell_nothing_are_told(
    second: list[float], words: str, run_job: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = [[1.0, 2.0], second, [1.0, 2.0], [1.0, 2.0]]
    pd.DataFrame({"id": list("abcd"), "embedding": vectors}).to_parquet(tmp_path / "theirs.parquet")
    given = ["--catalogue", written(tmp_path / "df.csv", FOUR), "--embeddings", tmp_path / "theirs.parquet"]
    outcome = run_job("evaluate", "--no-baselines", *given, "--out", tmp_path / "out")
    assert (outcome.code, words in caplog.text + outcome.errors) == (2 if "finite" in words else 0, True)


def test_same_file_in_gallery_or_train_is_counted(measure: Measure, tmp_path: Path) -> None:
    for id, content in zip("abcdef", (b"1", b"1", b"3", b"1", b"1", b"6"), strict=True):
        (tmp_path / f"{id}.jpg").write_bytes(content)
    found = measure(FOUR + "e,e.jpg,z,train,,\nf,f.jpg,z,train,,\n", RIGHT_FIRST)
    assert found["same_bytes"] == {
        "queries_in_gallery": 3, "queries_under_two_labels": 3, "measured_in_train": 3, "not_compared": 0
    }  # fmt: skip
    assert "3 measured images with the same file in train" in found["said"]
    report = (found["out"] / "report.html").read_text()
    assert "<dt>Queries with the same file in the gallery</dt><dd>3<" in report


@pytest.mark.parametrize("out", ["HTTP://x/y", "ftp://x/y"])
def test_out_in_a_store_that_cannot_be_written_is_refused_and_no_folder_is_made(
    out: str, run_job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "df.csv", FOUR)
    outcome = run_job("embed", "--catalogue", tmp_path / "df.csv", "--out", out, *EXTRACTOR)
    assert outcome.code == 2
    assert out.split(":")[0] in outcome.errors
    assert [path.name for path in tmp_path.iterdir()] == ["df.csv"]


def test_chain_that_changes_nothing_or_is_not_there_is_told(
    run_job: Callable, models: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = ["--catalogue", written(tmp_path / "df.csv", FOUR), "--model", models["identity"], "--max-rejects", 1]
    common += ["--candidates", written(tmp_path / "lists.csv", RIGHT_FIRST)]
    outcome = run_job("rerank", *common, "--chain", "first_stage", "--out", tmp_path / "a")
    assert outcome.code == 0, outcome.errors
    assert "THE ORDER OF THE LISTS STAYS AS IT IS" in caplog.text
    caplog.clear()
    run_job("rerank", *common, "--out", tmp_path / "b")
    assert "has no chain.json: CANDIDATES ARE ORDERED BY THE LOGIT ALONE" in caplog.text
