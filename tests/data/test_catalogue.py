import time
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.catalogue_files import read_catalogue, read_query_gallery
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations

TRAIN = "t,a.jpg,train,,\nt,b.jpg,train,,\n"
HEAD = "label,path,split,is_query,is_gallery\n"


def _csv(tmp_path: Path, text: str, name: str = "df.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def _error(uri: str, purpose: str) -> str:
    with pytest.raises(BadInput) as caught:
        read_catalogue(uri, purpose=purpose)  # type: ignore[arg-type]
    return str(caught.value)


def _one_line(tmp_path: Path, text: str, purpose: str = "evaluation") -> str:
    message = _error(_csv(tmp_path, text), purpose)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "rows", "validation", "labels"), [("grocery", 3232, 1639, 41), ("omniglot", 4840, 1940, 97)]
)
def test_read_catalogue_oml_tables_are_read_unchanged(
    shared_data: Path, name: str, rows: int, validation: int, labels: int
) -> None:
    path = shared_data / name / "df.csv"
    frame = pd.read_csv(path)
    for purpose in ("images", "evaluation", "training"):
        catalogue = read_catalogue(str(path), purpose=purpose)  # type: ignore[arg-type]
        assert len(catalogue) == rows == len(frame)
        assert catalogue.ids.tolist() == sorted(frame["path"])
    split = catalogue.restrict("validation")
    assert len(split.query_items) == len(split.gallery_items) == validation == (frame["split"] == "validation").sum()
    assert len(split.label_names) == labels
    expected = frame[frame["split"] == "validation"].set_index("path").loc[split.ids]
    assert [int(split.label_names[code]) for code in split.labels] == expected["label"].tolist()
    assert split.categories is not None
    assert split.category_names[split.categories].tolist() == expected["category"].tolist()
    assert all(Path(image.path).is_file() for image in split.images(np.arange(5)))
    train = catalogue.restrict("train")
    assert len(train.query_items) == 0
    assert len(train.as_query_and_gallery().query_items) == len(train)


@pytest.mark.parametrize(
    ("yes", "no"),
    [("True", "False"), ("1", "0"), ("1.0", "0.0"), ("true", "false"), ("TRUE", ""), ("1.0", "nan")],
)
def test_flags_in_every_spelling_of_oml(tmp_path: Path, yes: str, no: str) -> None:
    text = HEAD + TRAIN + f"v,c.jpg,validation,{yes},{no}\nv,d.jpg,validation,{no},{yes}\n"
    catalogue = read_catalogue(_csv(tmp_path, text), purpose="evaluation")
    assert catalogue.ids[catalogue.query_items].tolist() == ["c.jpg"]
    assert catalogue.ids[catalogue.gallery_items].tolist() == ["d.jpg"]


@pytest.mark.parametrize("dtype", ["bool", "int64", "float64", "object", "category", "Int64"])
def test_parquet_of_any_column_type_equals_the_csv(tmp_path: Path, dtype: str) -> None:
    frame = pd.DataFrame({"label": [3, 3, 11], "path": ["b.jpg", "a.jpg", "c.jpg"], "split": "validation"})
    frame["is_query"] = pd.Series([1, 0, 1]).astype(dtype)
    frame["is_gallery"] = True
    frame["sequence"] = [7.0, None, 7.0]
    frame.to_csv(tmp_path / "df.csv", index=False)
    frame.to_parquet(tmp_path / "df.parquet", index=False)
    csv = read_catalogue(str(tmp_path / "df.csv"), purpose="evaluation")
    parquet = read_catalogue(str(tmp_path / "df.parquet"), purpose="evaluation")
    assert csv.digest() == parquet.digest()
    assert parquet.label_names.tolist() == ["3", "11"]
    assert parquet.labels.tolist() == [0, 0, 1]
    assert parquet.sequences.tolist() == [-1, 0, 0]
    assert parquet.query_items.tolist() == [1, 2]


def test_labels_strings_and_none_at_all(tmp_path: Path) -> None:
    texts = read_catalogue(_csv(tmp_path, "label,path\nzebra,a\nna,b\n10,c\n,d\n"))
    assert texts.label_names.tolist() == ["10", "na", "zebra"]
    assert texts.labels.tolist() == [2, 1, 0, -1]
    bare = read_catalogue(_csv(tmp_path, "path\nb\na\n"))
    assert bare.labels.tolist() == [-1, -1]
    assert bare.label_names.tolist() == []
    assert bare.categories is None
    assert bare.sequences.tolist() == [-1, -1]
    with pytest.raises(BadInput, match="no row has split 'validation'"):
        bare.restrict("validation")


def test_digest_ignores_row_order_and_foreign_columns_but_nothing_else(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "label": ["x", "y", "y"], "path": ["a", "b", "c"], "split": "validation", "is_query": True,
            "is_gallery": True, "sequence": [1, 2, 2], "category": ["p", "q", None], "item": ["s", "t", None],
            "x_1": [0, None, 1], "y_1": [0, None, 1], "x_2": [5, None, 5], "y_2": [5, None, 5],
        }
    )  # fmt: skip

    def digest(table: pd.DataFrame) -> str:
        table.to_csv(tmp_path / "df.csv", index=False)
        return read_catalogue(str(tmp_path / "df.csv")).digest()

    first = digest(frame)
    assert digest(frame.iloc[::-1].assign(note="n")) == first
    changes = [
        ("label", "y"), ("path", "z"), ("split", "train"), ("is_query", False), ("is_gallery", False),
        ("sequence", 9), ("category", "r"), ("item", "w"), ("x_2", 6),
    ]  # fmt: skip
    digests = {first}
    for column, value in changes:
        changed = frame.copy()
        changed[column] = [value, *frame[column].tolist()[1:]]
        digests.add(digest(changed))
    assert len(digests) == len(changes) + 1


def test_items_are_text_and_a_photo_without_one_is_its_own(tmp_path: Path) -> None:
    catalogue = read_catalogue(_csv(tmp_path, "path,item\na,01\nb,\nc,1\nd,01\ne,\n"))
    assert catalogue.things is not None
    assert catalogue.thing_names[catalogue.things].tolist() == ["01", "b", "1", "01", "e"]
    assert catalogue.take(np.array([1, 4])).thing_names.tolist() == ["b", "e"]
    assert read_catalogue(_csv(tmp_path, "path\na\n")).things is None


def test_item_of_two_labels_is_refused_by_name_and_an_empty_one_is_none(tmp_path: Path) -> None:
    text = (
        "label,path,split,is_query,is_gallery,item\nv,c,validation,1,1,x\nw,d,validation,1,1,{}\nv,e,validation,1,1,\n"
    )
    text += "w,f,validation,1,1,\n"
    assert "items with photos of different labels: 'x'" in _one_line(tmp_path, text.format("x"))
    assert read_catalogue(_csv(tmp_path, text.format("y")), purpose="evaluation").things is not None


def test_boxes_enter_the_default_id_and_may_be_empty(tmp_path: Path) -> None:
    text = "path,x_1,y_1,x_2,y_2\na.jpg,1,2,30.7,40\na.jpg,5,6,7,8\na.jpg,,,,\n"
    catalogue = read_catalogue(_csv(tmp_path, text))
    folder = str(tmp_path)
    assert catalogue.images() == [
        ImageRef("a.jpg", f"{folder}/a.jpg", None),
        ImageRef("a.jpg#1,2,30,40", f"{folder}/a.jpg", (1, 2, 30, 40)),
        ImageRef("a.jpg#5,6,7,8", f"{folder}/a.jpg", (5, 6, 7, 8)),
    ]
    assert catalogue.images(np.array([2, 0, 2]))[0].box == (5, 6, 7, 8)


def test_paths_relative_to_the_table_and_absolute_ones_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    _csv(tmp_path / "sub", "path\nx/a.jpg\n/abs/b.jpg\ns3://bucket/c.jpg\n")
    monkeypatch.chdir(tmp_path)
    expected = {f"{tmp_path}/sub/x/a.jpg", "/abs/b.jpg", "s3://bucket/c.jpg"}
    for uri in ("sub/df.csv", f"file://{tmp_path}/sub/df.csv"):
        assert {image.path for image in read_catalogue(uri).images()} == expected


def test_uri_of_fsspec_resolves_its_images_beside_the_table() -> None:
    fsspec.filesystem("memory").pipe("/shop/df.csv", b"path\na.jpg\n")
    with pytest.raises(BadInput, match="scheme 'memory' is not allowed"):
        read_catalogue("memory://shop/df.csv")
    catalogue = read_catalogue("memory://shop/df.csv", schemes=locations.SCHEMES | {"memory"})
    assert catalogue.images()[0].path == "memory://shop/a.jpg"


def test_items_of_inverts_ids_and_names_unknown_ones(tmp_path: Path) -> None:
    catalogue = read_catalogue(_csv(tmp_path, "path\nc\na\nb\n"))
    assert catalogue.items_of(["b", "a", "b"]).tolist() == [1, 0, 1]
    with pytest.raises(BadInput, match=r"2 ids are not in .*'x', 'y'"):
        catalogue.items_of(["y", "a", "x", "x"])
    assert catalogue.take(np.array([2, 0])).ids.tolist() == ["a", "c"]


def test_ids_sort_by_code_point_whatever_the_script(tmp_path: Path) -> None:
    names = ["é", "Z", "a", "Ω", "10", "9", "😀", "z"]
    catalogue = read_catalogue(_csv(tmp_path, "path\n" + "\n".join(names)))
    assert catalogue.ids.tolist() == sorted(names)


def test_absent_column_suggests_the_near_miss(tmp_path: Path) -> None:
    message = _one_line(tmp_path, "labels,path,split,is_query,is_gallery\n1,a,validation,1,1\n")
    assert "no column 'label', needed for evaluation; did you mean 'labels'?" in message
    assert "no column 'path', needed for images; add it, or rename the one of 'file' that it is" in _one_line(
        tmp_path, "file\na\n", "images"
    )


def test_unknown_split_names_value_and_rows(tmp_path: Path) -> None:
    message = _one_line(tmp_path, HEAD + "v,a,validation,1,1\nv,b,val,1,1\nv,c,val,1,1\n")
    assert message.endswith("unknown split 'val'; use 'train', 'calibration' or 'validation' (rows 2, 3)")


def test_label_with_one_training_image_is_counted_and_no_reason_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "df.csv"
    path.write_text(HEAD + TRAIN + "lonely,c.jpg,train,,\n")
    with caplog.at_level("INFO"):
        assert len(read_catalogue(str(path), purpose="training")) == 3
    assert "1 of 2 train labels have one image" in caplog.text


def test_no_query_and_no_gallery_are_one_line_each(tmp_path: Path) -> None:
    assert "no query: set is_query" in _one_line(tmp_path, HEAD + "v,a,validation,0,1\n")
    assert "no gallery: set is_gallery" in _one_line(tmp_path, HEAD + "v,a,validation,1,\n")
    assert "no row has split 'validation'" in _one_line(tmp_path, HEAD + TRAIN)
    assert "no row has split 'train'" in _one_line(tmp_path, HEAD + "v,a,validation,1,1\n", "training")
    assert "the table has no rows" in _one_line(tmp_path, "path\n", "images")
    neither = _one_line(tmp_path, HEAD + "v,a,validation,1,1\nv,b,validation,0,0\n")
    assert "neither query nor gallery" in neither
    assert neither.endswith("(row 2)")


def test_duplicate_ids_name_them_and_both_rows(tmp_path: Path) -> None:
    message = _one_line(tmp_path, "path\na\nb\na\n", "images")
    assert "duplicate ids: 'a' in rows 1, 3; remove the repeats or give an id column" in message
    given = _one_line(tmp_path, "id,path\n7,a\n7,b\n", "images")
    assert "'7' in rows 1, 2" in given
    assert "empty id" in _one_line(tmp_path, "id,path\n7,a\n,b\n", "images")


@pytest.mark.parametrize(
    ("box", "expected"),
    [("1,,3,4", "box with NaN"), ("5,1,5,4", "inverted or empty box"), ("1,9,3,4", "inverted"),
     ("1,2,x,4", "not a number"), ("1,1,1e19,9", "not a number"), ("1,2,inf,4", "not a number"),
     ("nan,2,3,4", "box with NaN")],
)  # fmt: skip
def test_bad_box_is_one_line_with_its_row(tmp_path: Path, box: str, expected: str) -> None:
    message = _one_line(tmp_path, f"path,x_1,y_1,x_2,y_2\na,,,,\nb,{box}\n", "images")
    assert expected in message
    assert message.endswith("(row 2)")


def test_empty_label_path_and_flag_are_one_line_each(tmp_path: Path) -> None:
    assert "no label in validation rows" in _one_line(tmp_path, HEAD + ",a,validation,1,1\n")
    assert "no label in train rows" in _one_line(tmp_path, HEAD + TRAIN + ",c.jpg,train,,\n", "training")
    assert "empty path" in _one_line(tmp_path, "path,label\n,1\nb,1\n", "images")
    assert "is_query is 'yes'; use True/False" in _one_line(
        tmp_path, HEAD + "v,a,validation,yes,1\nv,b,validation,1,1\n"
    )
    assert "no column 'y_2'" in _one_line(tmp_path, "path,x_1,y_1,x_2\na,1,2,3\n", "images")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    text = "label,path,split,is_query,x_1,y_1,x_2,y_2\n"
    text += ",a,val,maybe,1,1,0,0\nv,a,validation,1,,,,1\nv,a,train,,,,,\n"
    message = _error(_csv(tmp_path, text), "evaluation")
    for part in (
        "'is_gallery'",
        "unknown split 'val'",
        "'maybe'",
        "inverted",
        "box with NaN",
        "duplicate ids",
    ):
        assert part in message
    assert len(message.splitlines()) == message.count("\n- ") + 1 == 7


@pytest.mark.parametrize("content", [b"", b"PAR1 broken", b"\xff\xfe\x00binary", b'path\n"a'])
def test_file_that_is_no_table_is_bad_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "df.csv").write_bytes(content)
    assert "neither a readable CSV nor a Parquet table" in _error(str(tmp_path / "df.csv"), "images")
    assert "cannot read the catalogue" in _error(str(tmp_path / "absent.csv"), "images")


def test_query_and_gallery_tables_become_one_catalogue(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    queries = _csv(tmp_path, f"id,path,label\nq,a.jpg,1\nboth,{tmp_path}/b.jpg,2\n", "q.csv")
    gallery = _csv(tmp_path / "g", f"id,path,label\ng,a.jpg,1\nboth,{tmp_path}/b.jpg,2\n", "g.csv")
    catalogue = read_query_gallery(queries, gallery, purpose="evaluation")
    assert catalogue.ids.tolist() == ["both", "g", "q"]
    assert catalogue.query_items.tolist() == [0, 2]
    assert catalogue.gallery_items.tolist() == [0, 1]
    assert [image.path for image in catalogue.images()] == [
        f"{tmp_path}/{name}" for name in ("b.jpg", "g/a.jpg", "a.jpg")
    ]
    assert catalogue.labels.tolist() == [1, 0, 0]
    clash = _csv(tmp_path / "g", "id,path,label\nq,other.jpg,1\n", "clash.csv")
    with pytest.raises(BadInput, match="ids 'q' stand for different rows"):
        read_query_gallery(queries, clash)
    with pytest.raises(BadInput, match=r"no label in validation rows.*\(row 2\)"):
        read_query_gallery(_csv(tmp_path, "path,label\na,1\nb,\n", "gap.csv"), gallery, purpose="evaluation")
    with pytest.raises(BadInput, match="no column 'label'"):
        read_query_gallery(queries, _csv(tmp_path, "path\na\n", "bare.csv"), purpose="evaluation")


def test_read_catalogue_many_rows_takes_seconds(tmp_path: Path) -> None:
    n = 20_000
    frame = pd.DataFrame({"label": np.arange(n) // 3, "path": [f"images/{i:07d}.jpg" for i in range(n)]})
    frame = frame.assign(split="validation", is_query=True, is_gallery=True, sequence=np.arange(n) // 2)
    frame.to_parquet(tmp_path / "df.parquet", index=False)
    start = time.perf_counter()
    catalogue = read_catalogue(str(tmp_path / "df.parquet"), purpose="evaluation")
    assert isinstance(catalogue, Catalogue)
    assert len(catalogue.label_names) == n // 3 + 1
    assert catalogue.sequences.max() == n // 2 - 1
    assert time.perf_counter() - start < 10


def test_labels_are_the_tables_own_memory_and_a_part_numbers_those_it_has(tmp_path: Path) -> None:
    cells = ["b", "10", "", "b", "a", "10", "a"]
    rows = "".join(f"p{number},{cell},train\n" for number, cell in enumerate(cells))
    catalogue = read_catalogue(_csv(tmp_path, f"path,label,split\n{rows}"))
    assert [catalogue.label_names[code] if code >= 0 else "" for code in catalogue.labels] == cells
    assert catalogue.label_names.tolist() == ["10", "a", "b"], "not all are integers, so these are in text order"
    part = catalogue.take(np.array([1, 4, 5]))
    assert (part.label_names.tolist(), part.labels.tolist()) == (["10", "a"], [0, 1, 0])
    held = pa.array(part.table["label"]).indices.to_numpy()
    assert np.shares_memory(part.labels, held), "labels are a copy"
    assert part.sequences.tolist() == [-1] * 3
    assert part.sequences.strides == (0,), "no sequence takes no memory"
    numbers = read_catalogue(_csv(tmp_path, "path,label\na,10\nb,9\nc,-1\n", "numbers.csv"))
    assert numbers.label_names.tolist() == ["-1", "9", "10"], "integers are in the order of their values"
    written = {name: [cell or None for cell in cells] if name == "label" else catalogue.table[name].tolist()
               for name in catalogue.table}  # fmt: skip
    assert Catalogue(pd.DataFrame(written), "").digest() == catalogue.digest(), "how a text is held changes no digest"


def test_gallery_blocks_hold_every_gallery_item_once(tmp_path: Path) -> None:
    rows = "".join(f"p{number},1,validation,1,{number % 3 != 1:d}\n" for number in range(10))
    catalogue = read_catalogue(_csv(tmp_path, f"path,label,split,is_query,is_gallery\n{rows}"))
    expected = [0, 2, 3, 5, 6, 8, 9]
    assert np.concatenate(list(catalogue.gallery_blocks(4))).tolist() == expected == catalogue.gallery_items.tolist()
    assert catalogue.n_gallery == len(expected)
