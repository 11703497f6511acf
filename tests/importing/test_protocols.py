"""Miniature archives of the literature's data sets: who trains, who asks, who answers."""

from pathlib import Path

import pytest
import torch
from importing.test_catalogue import imported, photo

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.importing.protocols import COUNTS
from distributed_rerank.tensors.knn import nearest


def test_sop_measures_each_photo_against_all_others(tmp_path: Path) -> None:
    home = tmp_path / "archive" / "Stanford_Online_Products"
    for name, first in (("Ebay_train.txt", 1), ("Ebay_test.txt", 3)):
        lines = ["image_id class_id super_class_id path"]
        for label in (first, first + 1):
            for number in range(3):
                path = f"bicycle_final/{label}_{number}.JPG"
                photo(home / path, label)
                lines.append(f"{number} {label} 1 {path}")
        (home / name).write_text("\n".join(lines) + "\n")
    found = imported(tmp_path / "archive")
    assert (found.layout, found.has_own_split) == ("sop", True)
    assert found.counts() == {"train": 6, "train labels": 2, "queries": 6, "gallery": 6, "validation labels": 2}
    assert set(found.catalogue.table["category"]) == {"bicycle"}


def test_inshop_has_two_lists(tmp_path: Path) -> None:
    lines = ["7", "image_name item_id evaluation_status"]
    rows = [
        ("1", "train"),
        ("1", "train"),
        ("2", "query"),
        ("2", "gallery"),
        ("2", "gallery"),
        ("3", "query"),
        ("3", "gallery"),
    ]
    for number, (item, status) in enumerate(rows):
        path = f"img/WOMEN/Dresses/id_0000000{item}/0{number}_1_front.jpg"
        photo(tmp_path / "inshop" / path, number)
        lines.append(f"{path}    id_0000000{item}   {status}")
    (tmp_path / "inshop" / "Eval").mkdir()
    (tmp_path / "inshop" / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines))
    found = imported(tmp_path / "inshop")
    assert found.layout == "inshop"
    assert found.counts() == {"train": 2, "train labels": 1, "queries": 2, "gallery": 3, "validation labels": 2}
    table = found.catalogue.table
    assert not (table["is_query"] & table["is_gallery"]).any()
    assert set(table["category"]) == {"Dresses"}


def test_cub_and_cars_train_on_the_first_half_of_the_classes(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    classes = [1, 1, 98, 98, 99, 99, 100, 100, 101, 101, 196, 196]
    cub, cars = tmp_path / "cub" / "CUB_200_2011", tmp_path / "cars"
    for number, name in enumerate(classes):
        photo(cub / "images" / f"{name:03d}.Bird" / f"{number}.jpg", number)
        photo(cars / "car_ims" / f"{number}.jpg", number)
    images = "\n".join(f"{n + 1} {name:03d}.Bird/{n}.jpg" for n, name in enumerate(classes))
    (cub / "images.txt").write_text(images)
    (cub / "image_class_labels.txt").write_text("\n".join(f"{n + 1} {name}" for n, name in enumerate(classes)))
    import numpy as np

    kind = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
    marks = np.array([(f"car_ims/{n}.jpg", name, 0) for n, name in enumerate(classes)], dtype=kind)
    savemat(cars / "cars_annos.mat", {"annotations": marks})
    birds, models = imported(tmp_path / "cub"), imported(cars)
    assert (birds.layout, models.layout) == ("cub", "cars")
    assert birds.counts() == {"train": 8, "train labels": 4, "queries": 4, "gallery": 4, "validation labels": 2}
    assert models.counts() == {"train": 4, "train labels": 2, "queries": 8, "gallery": 8, "validation labels": 4}


def test_market_leaves_out_answers_of_the_same_camera_and_junk(tmp_path: Path) -> None:
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000452_01.jpg"],
        "query": ["0001_c1s1_001051_00.jpg"],
        "bounding_box_test": [
            "0001_c1s2_000001_01.jpg", "0001_c2s1_000001_01.jpg", "0000_c1s1_000151_01.jpg", "-1_c1s1_000401_03.jpg",
            "0003_c1s1_000001_01.jpg",
        ],
    }  # fmt: skip
    for part, files in names.items():
        for number, name in enumerate(files):
            photo(tmp_path / "Market-1501-v15.09.15" / part / name, number)
    found = imported(tmp_path / "Market-1501-v15.09.15")
    assert found.layout == "market1501"
    assert found.counts() == {"train": 2, "train labels": 1, "queries": 1, "gallery": 4, "validation labels": 3}
    answers = found_by_search(found.catalogue.restrict("validation"))
    assert answers == ["0000_c1s1_000151_01.jpg", "0001_c2s1_000001_01.jpg", "0003_c1s1_000001_01.jpg"]
    photo(tmp_path / "Market-1501-v15.09.15" / "query" / "me.jpg")
    with pytest.raises(BadInput, match="is not named as Market-1501's photos are"):
        imported(tmp_path / "Market-1501-v15.09.15")


def found_by_search(catalogue: Catalogue) -> list[str]:
    """The names of what an exact search returns for the one query, by the catalogue's own rules."""
    query, gallery = torch.from_numpy(catalogue.query_items), torch.from_numpy(catalogue.gallery_items)
    sequences = torch.tensor(catalogue.sequences).long()
    lists = nearest(
        torch.zeros(1, 2), torch.rand(len(gallery), 2), query_items=query, gallery_items=gallery,
        query_sequences=sequences[query], gallery_sequences=sequences[gallery], n_items=10,
    )  # fmt: skip
    return sorted(Path(catalogue.table["path"].iloc[item]).name for item in lists.items[0].tolist() if item >= 0)


def test_published_counts_are_complete() -> None:
    """As the papers state them; a whole archive with other counts is warned of."""
    assert sum(COUNTS["sop"][part] for part in ("train", "queries")) == 120_053
    assert sum(COUNTS["inshop"][part] for part in ("train", "queries", "gallery")) == 52_712
    assert sum(COUNTS["cub"][part] for part in ("train", "queries")) == 11_788
    assert sum(COUNTS["cars"][part] for part in ("train", "queries")) == 16_185
    assert COUNTS["market1501"]["gallery"] == 19_732 - 3_819
