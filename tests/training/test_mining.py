"""What is told of mining: the planted duplicate and the planted wrong label are found, the figures are the lists'."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_examples import BACKBONE, SMALL, TOKENS, draw_catalogue

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.extraction import embed
from distributed_rerank.tensors.candidate_lists import CandidateLists, empty_lists
from distributed_rerank.training.evidence import retrieve_among
from distributed_rerank.training.mining import find_suspect_pairs, mining_in_text, write_mining
from distributed_rerank.training.stage import make_task
from distributed_rerank.training.task import TrainingTask


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingTask, CandidateLists, Path]:
    """A task whose catalogue has one picture under two labels, with every image's nearest ten."""
    folder = tmp_path_factory.mktemp("planted")
    draw_catalogue(folder / "images")
    shutil.copy(folder / "images" / "3-1.png", folder / "images" / "8-copy.png")
    with open(folder / "images" / "table.csv", "a") as table:
        table.write("8,8-copy.png,train,,\n")
    catalogue = read_catalogue(str(folder / "images" / "table.csv"), purpose="training").restrict("train")
    catalogue = catalogue.as_query_and_gallery()
    embeddings = embed(catalogue, BACKBONE, folder / "embeddings")
    task = make_task(catalogue, embeddings, TOKENS, SMALL, folder)
    nearest = retrieve_among(np.arange(len(catalogue)), catalogue, embeddings, 10, folder / "nearest", None)
    return task, nearest, folder


def test_one_picture_under_two_labels_is_the_first_suspect(
    planted: tuple[TrainingTask, CandidateLists, Path],
) -> None:
    task, nearest, folder = planted
    content = write_mining(task, nearest, folder)
    assert content == json.loads((folder / "mining.json").read_text())
    rows = tables.read_table(folder, "suspects").to_pylist()
    first = rows[0]
    assert (first["id"], first["other_id"]) == ("3-1.png", "8-copy.png")
    assert (first["label"], first["other_label"], first["kind"]) == ("3", "8", "duplicate")
    assert first["distance"] < 1e-3
    assert content["suspects"]["n_duplicates"] == 1
    order = [(-row["precision"], row["distance"]) for row in rows]
    assert order == sorted(order)
    assert first["precision"] == 1.0
    by_kind = {"duplicate": 1.0, "mislabel": 0.5, "look-alike": 0.0}
    assert all(row["precision"] >= by_kind[row["kind"]] for row in rows)
    assert content["suspects"]["n_mislabels"] == sum(row["kind"] == "mislabel" for row in rows)
    assert all(row["label"] != row["other_label"] for row in rows)


def test_figures_are_those_of_the_lists_trained_on(planted: tuple[TrainingTask, CandidateLists, Path]) -> None:
    task, nearest, folder = planted
    lists = write_mining(task, nearest, folder)["lists"]
    queries, items, distances = task.runs[-1].anchors.arrays()
    labels = task.catalogue.labels
    is_there = items >= 0
    is_positive = is_there & (labels[items] == labels[queries][:, None])
    assert lists["n_anchors"] == len(task.catalogue) == 41
    assert lists["n_candidates"] == is_there.sum()
    assert lists["positive_distances"]["n"] == is_positive.sum()
    assert lists["positive_distances"]["mean"] == pytest.approx(distances[is_positive].mean(), abs=1e-5)
    assert lists["negative_distances"]["n"] == (is_there & ~is_positive).sum()
    assert lists["n_without_positive"] == (~is_positive.any(axis=1)).sum()
    assert lists["share_of_hardest_used"] == 1.0  # no filter is set


def test_text_shows_the_figures(planted: tuple[TrainingTask, CandidateLists, Path]) -> None:
    task, nearest, folder = planted
    content = write_mining(task, nearest, folder)
    content["lists"]["dropped"] = {"min_distance": 1234, "range_min": 0}
    text = mining_in_text(content)
    assert text.startswith("mining: 41 anchors, ")
    rows = {line.rpartition(" ")[0].strip(): line.split()[-1] for line in text.splitlines()}
    assert rows["dropped by min_distance"] == "1,234"
    assert "dropped by range_min" not in rows
    assert rows["hardest impostor used"] == "100.0%"


def test_catalogue_without_neighbours_has_no_suspects(planted: tuple[TrainingTask, CandidateLists, Path]) -> None:
    catalogue: Catalogue = planted[0].catalogue
    empty = empty_lists(torch.arange(41), 0)
    table, figures = find_suspect_pairs(empty, catalogue)
    assert len(table) == figures["n_pairs"] == 0
