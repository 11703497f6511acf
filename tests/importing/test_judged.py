"""Miniature archives of data sets that are judged pair by pair, against their protocols written out by hand."""

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from importing.test_catalogue import imported, photo

from distributed_rerank import command_line
from distributed_rerank.errors import BadInput
from distributed_rerank.importing.protocols import COUNTS

GALLERY = [f"all_souls_{n:06d}" for n in range(4)] + [f"magdalen_{n:06d}" for n in range(3)] + ["oxford_000009"]
QUERIES = ["all_souls_000013", "magdalen_000078"]
TRUTH = [
    {"bbx": [1.0, 2.0, 9.0, 12.0], "easy": np.array([0]), "hard": [1, 2], "junk": np.array([3])},
    {"bbx": [0.0, 0.0, 8.0, 8.0], "easy": [4, 5], "hard": np.array([], int), "junk": [6]},
]


@pytest.fixture
def roxford(tmp_path: Path) -> Path:
    home = tmp_path / "roxford5k"
    for number, stem in enumerate(QUERIES + GALLERY):
        photo(home / "jpg" / f"{stem}.jpg", number)
    truth = {"imlist": GALLERY, "qimlist": QUERIES, "gnd": TRUTH}
    (home / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return home


def test_roxford_has_boxes_of_queries_and_three_protocols(roxford: Path) -> None:
    found = imported(roxford)
    assert (found.layout, found.has_own_split) == ("roxford", True)
    assert (found.counts()["queries"], found.counts()["gallery"], found.counts()["train"]) == (2, 8, 0)
    assert COUNTS["roxford"] == {"queries": 70, "gallery": 4_993}
    assert COUNTS["rparis"] == {"queries": 70, "gallery": 6_322}
    table = found.catalogue.table.set_index("id")
    assert table.loc["query all_souls_000013", ["x_1", "y_1", "x_2", "y_2"]].tolist() == [1, 2, 9, 12]
    assert not (table["is_query"] & table["is_gallery"]).any()
    grades = {file.name: pd.read_csv(file) for file in found.judgements}
    assert sorted(grades) == ["df.easy.csv", "df.hard.csv", "df.medium.csv"]
    hard = grades["df.hard.csv"]
    of_first = hard[hard["query_id"] == "query all_souls_000013"].set_index("gallery_id")["relevance"].to_dict()
    assert of_first == {GALLERY[1]: 1, GALLERY[2]: 1, GALLERY[0]: -1, GALLERY[3]: -1}


@pytest.mark.parametrize("setup", ["easy", "medium", "hard"])
def test_figures_of_roxford_are_those_of_the_protocol(roxford: Path, setup: str, tmp_path: Path) -> None:
    """Junk leaves the list before a rank is counted; a query without a relevant photo is left out."""
    found = imported(roxford)
    order = np.random.default_rng(3).permuted(np.tile(np.arange(8), (2, 1)), axis=1)
    rows = [
        (f"query {query}", GALLERY[item], place)
        for query, items in zip(QUERIES, order, strict=True)
        for place, item in enumerate(items.tolist())
    ]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"]).to_csv(tmp_path / "lists.csv", index=False)
    out = tmp_path / "evaluation"
    command = [
        "evaluate", "--catalogue", str(tmp_path / "out" / "df.csv"), "--candidates", str(tmp_path / "lists.csv"),
        "--judgements", str(tmp_path / "out" / f"df.{setup}.csv"), "--out", str(out), "--num-workers", "0",
        "--trec", str(tmp_path / "trec"),
    ]  # fmt: skip
    assert found.judgements
    command_line.run(command)
    right = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}[setup]
    expected = []
    for truth, items in zip(TRUTH, order, strict=True):
        relevant = {int(item) for part in right for item in truth[part]}
        junk = {int(item) for part in ("easy", "hard", "junk") if part not in right for item in truth[part]}
        kept = [item for item in items.tolist() if item not in junk]
        hits = [place for place, item in enumerate(kept, 1) if item in relevant]
        if relevant:
            expected.append(sum(n / place for n, place in enumerate(hits, 1)) / len(relevant))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n_queries"] == len(expected)
    assert metrics["first_stage"]["map@10"] == pytest.approx(np.mean(expected))
    relevant_lines = (tmp_path / "trec" / "qrels.trec").read_text().splitlines()
    assert len(relevant_lines) == sum(len(truth[part]) for truth in TRUTH for part in right)


def test_ground_truth_that_would_run_a_program_is_refused(roxford: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "harm",)

    (roxford / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": Harmful()}))
    with pytest.raises(BadInput, match="is not the ground truth"):
        imported(roxford)
    assert not (tmp_path / "harm").exists()


def test_missing_photo_of_roxford_is_named(roxford: Path) -> None:
    (roxford / "jpg" / f"{GALLERY[2]}.jpg").unlink()
    with pytest.raises(BadInput, match=f"lacks 1 photos of gnd_roxford5k.pkl, first {GALLERY[2]}"):
        imported(roxford)


def test_task_of_mieb_is_measured_by_its_qrels(tmp_path: Path) -> None:
    home = tmp_path / "task"
    content = [{"bytes": photo(tmp_path / f"{n}.png", n).read_bytes(), "path": None} for n in range(6)]
    tables = {
        "corpus": pd.DataFrame({"id": ["a", "b", "c/../d", "1"], "image": content[:4]}),
        "query": pd.DataFrame({"id": ["1", "2"], "image": content[4:]}),
        "qrels": pd.DataFrame({"query-id": ["1", "1", "2"], "corpus-id": ["a", "1", "b"], "score": [1, 1, 0]}),
    }
    for name, table in tables.items():
        (home / name).mkdir(parents=True)
        table.to_parquet(home / name / "test-00000-of-00001.parquet")
    found = imported(home)
    assert found.layout == "mieb"
    assert (found.counts()["queries"], found.counts()["gallery"]) == (2, 4)
    (file,) = found.judgements
    assert pd.read_csv(file)["gallery_id"].tolist() == ["corpus a", "corpus 1"]
    labels = found.catalogue.table.set_index("id")["label"]
    assert {path.parents[1].name for path in map(Path, found.catalogue.table["path"])} == {"df_images"}
    assert sorted(path.name for path in home.iterdir()) == ["corpus", "qrels", "query"], "the download was changed"
    assert labels["query 1"] == labels["corpus a"] == labels["corpus 1"] != labels["query 2"]
    pd.DataFrame({"id": ["1"], "text": ["a red car"]}).to_parquet(home / "query" / "test-00000-of-00001.parquet")
    with pytest.raises(BadInput, match="query 1 has no image"):
        imported(home)
