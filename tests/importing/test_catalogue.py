"""Folders as people have them, in miniature: each layout gives the rows that its files say."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_catalogue import save_picture

from distributed_rerank import command_line
from distributed_rerank.config.importing import ImportConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.importing.catalogue import Imported, find_layout, import_folder

ROOT = Path(__file__).parents[2]


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(path, seed)
    return path


def imported(folder: Path, **settings: object) -> Imported:
    """As auto finds it, written into a folder beside it."""
    out = folder.parent / "out" / "df.csv"
    return import_folder(folder, out, ImportConfig(**settings), overwrite=True)  # pyright: ignore


def labels_of(found: Imported, split: str) -> set[str]:
    table = found.catalogue.table
    return set(table.loc[table["split"] == split, "label"])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Eight labels of three photos, one of a single photo, a broken photo, a hidden file and no photo at all."""
    for label in range(8):
        for number in range(3):
            photo(tmp_path / "photos" / ("train", "val")[number % 2] / "shoes" / f"s{label}" / f"{number}.jpg", label)
    photo(tmp_path / "photos" / "train" / "lonely" / "1.png")
    (tmp_path / "photos" / "train" / "shoes" / "s1" / "broken.jpg").write_bytes(b"no photo")
    (tmp_path / "photos" / "train" / "shoes" / "s1" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "photos" / "readme.txt").write_text("hello")
    return tmp_path / "photos"


def test_folders_are_labels_and_no_label_is_in_both_parts(folders: Path) -> None:
    """A split by photos, as classification has it (train, val), is no split by label, so it is drawn anew."""
    found = imported(folders)
    assert (found.layout, found.has_own_split) == ("folders", False)
    assert found.counts() == {"train": 12, "train labels": 4, "queries": 12, "gallery": 13, "validation labels": 5}
    assert not labels_of(found, "train") & labels_of(found, "validation")
    assert "lonely" in labels_of(found, "validation")
    assert [line.partition(": ")[0].rpartition("/")[2] for line in found.unreadable] == ["broken.jpg"]
    table = found.catalogue.table.set_index("label")
    assert table.loc["shoes/s1", "category"].tolist() == ["shoes"] * 3
    assert all(Path(path).is_file() for path in table["path"])
    assert labels_of(imported(folders), "train") == labels_of(found, "train")
    assert labels_of(imported(folders, split_seed=3), "train") != labels_of(found, "train")
    assert imported(folders, validation_share=0.25).counts()["train labels"] == 6


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_paths_are_relative_where_the_table_lies_above_the_photos(folders: Path, suffix: str) -> None:
    import_folder(folders, folders / f"df{suffix}", ImportConfig(layout="folders"))
    table = pd.read_csv(folders / "df.csv") if suffix == ".csv" else pd.read_parquet(folders / "df.parquet")
    assert all((folders / path).is_file() and not path.startswith("/") for path in table["path"])


def test_imagefolder_reads_both_kinds_of_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    lines = []
    for number in range(12):
        name = photo(folder / "train" / f"{number}.png", number).name
        lines.append({"file_name": name, "text": "a shoe", "sku": f"0{number // 3}"})
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(BadInput, match=r"no label in label or .*; name its field with --label-field \(text, sku\)"):
        imported(folder)
    found = imported(folder, label_field="sku")
    assert found.layout == "imagefolder"
    assert set(found.catalogue.table["label"]) == {"00", "01", "02", "03"}
    (folder / "train" / "metadata.jsonl").unlink()
    pd.DataFrame(lines).to_csv(folder / "train" / "metadata.csv", index=False)
    again = imported(folder, label_field="sku")
    assert again.catalogue.digest() == found.catalogue.digest()


def coco(folder: Path) -> None:
    images, marks = [], []
    for number in range(6):
        photo(folder / "images" / f"{number}.png", number)
        images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 30})
        for part in range(2):
            marks.append(
                {
                    "id": 2 * number + part, "image_id": number, "category_id": 7 + part,
                    "bbox": [5 * part, 2, 12.5, 9], "attributes": {"sku": f"{part}-{number // 3}"},
                }
            )  # fmt: skip
    content = {
        "images": images,
        "annotations": marks,
        "categories": [{"id": 7, "name": "shoe"}, {"id": 8, "name": "bag"}],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))


def test_coco_boxes_become_rows(tmp_path: Path) -> None:
    coco(tmp_path / "coco")
    found = imported(tmp_path / "coco", label_field="sku")
    assert (found.layout, len(found.catalogue)) == ("coco", 12)
    table = found.catalogue.table
    assert set(table["label"]) == {"0-0", "0-1", "1-0", "1-1"}
    assert set(table["category"]) == {"shoe", "bag"}
    boxes = table.loc[table["category"] == "bag", ["x_1", "y_1", "x_2", "y_2"]].drop_duplicates().values.tolist()
    assert boxes == [[5, 2, 17, 11]]
    assert table["path"].nunique() == 6
    with pytest.raises(BadInput, match="2 labels with two photos or more"):
        imported(tmp_path / "coco")


def test_cvat_boxes_and_tags_become_rows(tmp_path: Path) -> None:
    marks = []
    for number in range(12):
        photo(tmp_path / "cvat" / "images" / f"{number}.png", number)
        attribute = f'<attribute name="sku">k{number // 3}</attribute>'
        box = f'<box label="shoe" xtl="1.5" ytl="2" xbr="20" ybr="21">{attribute}</box>'
        mark = box if number % 2 else f'<tag label="shoe">{attribute}</tag>'
        marks.append(f'<image id="{number}" name="{number}.png" width="40" height="30">{mark}</image>')
    (tmp_path / "cvat" / "annotations.xml").write_text(f"<annotations>{''.join(marks)}</annotations>")
    found = imported(tmp_path / "cvat", label_field="sku")
    assert (found.layout, set(found.catalogue.table["label"])) == ("cvat", {"k0", "k1", "k2", "k3"})
    assert int(found.catalogue.table["x_1"].notna().sum()) == 6
    with pytest.raises(BadInput, match="has no colour; name --label-field"):
        imported(tmp_path / "cvat", label_field="colour")


def test_fiftyone_exports_are_read(tmp_path: Path) -> None:
    samples, labels = [], {}
    for number in range(12):
        photo(tmp_path / "one" / "data" / f"{number}.png", number)
        photo(tmp_path / "two" / "data" / f"{number}.png", number)
        box = {"label": f"p{number // 3}", "bounding_box": [0.25, 0.5, 0.5, 0.5]}
        samples.append(
            {
                "filepath": f"data/{number}.png", "metadata": {"width": 40, "height": 30},
                "ground_truth": {"_cls": "Detections", "detections": [box]},
            }
        )  # fmt: skip
        labels[str(number)] = number // 3
    (tmp_path / "one" / "samples.json").write_text(json.dumps({"samples": samples}))
    content = {"classes": ["p0", "p1", "p2", "p3"], "labels": labels}
    (tmp_path / "two" / "labels.json").write_text(json.dumps(content))
    boxes, whole = imported(tmp_path / "one"), imported(tmp_path / "two")
    assert boxes.layout == whole.layout == "fiftyone"
    assert set(boxes.catalogue.table["label"]) == set(whole.catalogue.table["label"]) == {"p0", "p1", "p2", "p3"}
    corners = boxes.catalogue.table[["x_1", "y_1", "x_2", "y_2"]].drop_duplicates().values.tolist()
    assert corners == [[10, 15, 30, 30]]


def test_omls_table_keeps_its_split(tmp_path: Path) -> None:
    rows = ["label,path,split,is_query,is_gallery,category"]
    for number in range(12):
        photo(tmp_path / "oml" / "images" / f"{number}.png", number)
        split, query = ("train", "") if number < 6 else ("validation", str(number % 2 == 0))
        rows.append(f"{number // 3},images/{number}.png,{split},{query},{'True' if number > 5 else ''},c")
    (tmp_path / "oml" / "df.csv").write_text("\n".join(rows))
    found = imported(tmp_path / "oml")
    assert (found.layout, found.has_own_split) == ("oml", True)
    assert found.counts() == {"train": 6, "train labels": 2, "queries": 3, "gallery": 6, "validation labels": 2}


def test_photos_in_no_folder_and_pipes_are_left_out_with_a_word(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo(folders / "beside.png")
    assert len(imported(folders).catalogue) == 25
    assert f"left out: 1 photos that lie in no folder of a label, first {folders}/beside.png" in caplog.text
    os.mkfifo(folders / "pipe.png")
    rows = [{"file_name": str(path.relative_to(folders)), "label": path.parent.name} for path in folders.rglob("?.jpg")]
    rows.append({"file_name": "pipe.png", "label": "s1"})
    (folders / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = imported(folders, layout="imagefolder")
    assert found.unreadable == [f"{folders}/pipe.png: no regular file"]
    assert len(found.catalogue) == 24


def test_files_that_no_photo_is_called_like_are_counted_by_their_names(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = folders / "train" / "shoes" / "s1"
    for number in range(3):
        (home / f"{number}.HEIC").write_bytes((home / "0.jpg").read_bytes())
    (home / "gone.jpg").symlink_to("nowhere.jpg")
    (home / "8.JFIF").write_bytes((home / "0.jpg").read_bytes())
    assert len(imported(folders).catalogue) == 26
    assert "left out by their names: 3 .heic, 1 .txt, 1 dangling links; photos are called .avif " in caplog.text
    heic = folders.parent / "heic" / "a"
    heic.mkdir(parents=True)
    (heic / "1.heic").touch()
    with pytest.raises(BadInput, match=r"has no folders with photos in it \(1 \.heic\)"):
        imported(heic.parent)


def test_a_link_to_a_photo_of_its_label_is_left_out_and_of_another_label_refused(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = folders / "train" / "shoes"
    before = imported(folders).catalogue.ids.tolist()
    (home / "s1" / "z.jpg").symlink_to("0.jpg")
    assert imported(folders).catalogue.ids.tolist() == before
    assert "left out: 1 rows of photos, or boxes in them, that are there already" in caplog.text
    (home / "s2" / "z.jpg").symlink_to(home / "s1" / "0.jpg")
    with pytest.raises(BadInput, match=r"s1/0\.jpg and .*s2/z\.jpg are one photo with two labels, 'shoes/s1' and"):
        imported(folders)


def test_a_table_that_somebody_has_edited_is_not_replaced(folders: Path) -> None:
    out = folders.parent / "df.csv"
    words = ["catalogue", str(folders), "--out", str(out)]
    command_line.run(words)
    command_line.run(words)
    edited = out.read_text().replace("shoes/s1", "boots/s1")
    out.write_text(edited)
    with pytest.raises(BadInput, match=r"df\.csv is there with other rows; choose another file, or give --overwrite"):
        command_line.run(words)
    assert out.read_text() == edited
    command_line.run([*words, "--overwrite"])
    assert "boots" not in out.read_text()


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="has no folders with photos"):
        imported(tmp_path / "empty")
    photo(tmp_path / "few" / "a" / "1.png")
    with pytest.raises(BadInput, match="0 labels with two photos or more, of 1"):
        imported(tmp_path / "few")
    with pytest.raises(BadInput, match=r"must end in \.csv or \.parquet"):
        import_folder(tmp_path / "few", tmp_path / "x.txt", ImportConfig())
    with pytest.raises(BadInput, match=r"has no Ebay_train\.txt, which Stanford Online Products comes with"):
        imported(tmp_path / "few", layout="sop")
    with pytest.raises(BadInput, match=r"validation_share=1\.0 is no share"):
        ImportConfig(validation_share=1.0)


def test_layout_of_a_plain_folder(folders: Path) -> None:
    assert find_layout(folders) == "folders"


def test_folder_to_report_in_three_commands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No file is written by hand: folder, catalogue, model, report."""
    generator = np.random.default_rng(1)
    for label in range(16):
        for number in range(4):
            photo(tmp_path / "photos" / f"thing {label}" / f"{number}.png", int(generator.integers(1000)))
    extractor = ["--extractor", "test_resnet", "--extractor-weights", "none", "--image-size", "32"]
    table = ["--catalogue", str(tmp_path / "photos.csv"), "--num-workers", "0"]
    caplog.set_level(logging.INFO)
    assert command_line.run(["catalogue", str(tmp_path / "photos"), "--out", str(tmp_path / "photos.csv")]) is None
    assert "64 photos of 16 labels" in caplog.text
    assert "train: 32 photos of 8 labels; validation: 32 queries, 32 gallery items, 8 labels" in caplog.text
    model = str(tmp_path / "model")
    command_line.run(
        ["train", *table, "--out", model, *extractor, "--epochs", "2", "--steps-per-epoch", "2", "--grid", "2",
         "--n-items", "10", "--top-n", "5"]
    )  # fmt: skip
    command_line.run(["evaluate", *table, "--out", str(tmp_path / "report"), "--model", model, *extractor])
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_the_command_answers_before_torch_is_loaded(folders: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from distributed_rerank import command_line as c\n"
        f"c.run(['catalogue', {str(folders)!r}, '--out', {str(tmp_path / 'df.csv')!r}])\n"
        "assert not {'torch', 'timm', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
