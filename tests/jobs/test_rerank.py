"""jobs/rerank.py on catalogues without labels."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from job_files import EXTRACTOR


@pytest.fixture
def photos(catalogue_path: Path, tmp_path: Path) -> Path:
    """A table of ids and paths only."""
    names = [f"{label:02d}-{image}.png" for label in range(4) for image in range(4)]
    rows = [(f"photo {name}", str(catalogue_path.parent / name)) for name in names]
    pd.DataFrame(rows, columns=["id", "path"]).to_csv(tmp_path / "photos.csv", index=False)
    return tmp_path / "photos.csv"


def test_own_lists_are_re_ordered(photos: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path) -> None:
    outcome = run_job(
        "rerank",
        "--catalogue",
        photos,
        "--model",
        models["concat"],
        *EXTRACTOR,
        "--n-items",
        8,
        "--out",
        tmp_path / "o",
    )
    assert outcome.code == 0, outcome.errors
    table = pd.read_parquet(tmp_path / "o" / "reranked.parquet")
    assert list(table.columns) == [
        "query_id", "gallery_id", "rank", "distance", "first_stage_rank", "first_stage_distance", "logit",
        "probability",
    ]  # fmt: skip
    assert len(table) == 16 * 8
    assert (table["query_id"] != table["gallery_id"]).all()
    candidates = pd.read_parquet(tmp_path / "o" / "candidates" / "candidates.parquet")
    joined = table.merge(candidates, on=["query_id", "gallery_id"], suffixes=("", "_given"))
    assert len(joined) == len(table)
    assert (joined["first_stage_rank"] == joined["rank_given"]).all()
    assert (joined["first_stage_distance"] == joined["distance_given"]).all()
    pairs = pd.read_parquet(tmp_path / "o" / "pair_distances" / "pair_distances.parquet")
    assert len(pairs) == 16 * 6 == table["logit"].notna().sum()
    scored = table[table["logit"].notna()]
    assert table["probability"].notna().equals(table["logit"].notna())
    expected = 1 / (1 + np.exp(2.0 * scored["distance"] - 0.5))
    np.testing.assert_allclose(scored["probability"], expected, atol=1e-6)
    first = table[table["rank"] == 1].set_index("query_id")
    asked = pd.read_csv(tmp_path / "o" / "label_next.csv")
    assert sorted(asked["query_id"]) == sorted(first.index), "fewer than 50 queries: all of them"
    assert asked["gallery_id"].tolist() == first.loc[asked["query_id"], "gallery_id"].tolist()
    n_firsts = asked["gallery_id"].nunique()
    assert asked["gallery_id"][:n_firsts].is_unique
    assert (asked["probability"][:n_firsts] - 0.5).abs().is_monotonic_increasing
    for _, rows in table.groupby("query_id"):
        assert rows["rank"].tolist() == list(range(1, 9))
        assert sorted(rows["first_stage_rank"][:6]) == list(range(1, 7))
        assert rows["first_stage_rank"].tolist()[6:] == [7, 8]
        head = rows[:6]
        fused = (0.5 * head["first_stage_distance"] + 100 * head["logit"]).tolist()
        assert np.all(np.diff(fused) >= -1e-4)


def test_given_lists_keep_their_pairs(photos: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path) -> None:
    rows = [("photo 00-0.png", f"photo 0{n}-1.png", 0.1 * n) for n in (3, 1, 2)]
    rows += [("photo 02-0.png", "photo 01-1.png", 0.5)]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "score"]).to_csv(tmp_path / "lists.csv", index=False)
    outcome = run_job(
        "rerank", "--catalogue", photos, "--candidates", tmp_path / "lists.csv", "--model", models["random"],
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert outcome.code == 0, outcome.errors
    table = pd.read_parquet(tmp_path / "o" / "reranked.parquet")
    assert set(zip(table["query_id"], table["gallery_id"], strict=True)) == {(q, g) for q, g, _ in rows}
    first = table[table["query_id"] == "photo 00-0.png"].sort_values("first_stage_rank")
    assert first["gallery_id"].tolist() == ["photo 03-1.png", "photo 02-1.png", "photo 01-1.png"]
    assert first["first_stage_distance"].tolist() == pytest.approx([-0.3, -0.2, -0.1])
    assert table["logit"].notna().all()
    again = run_job(
        "rerank", "--catalogue", photos, "--candidates", tmp_path / "lists.csv", "--model", models["random"],
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert again.code == 0


def test_unknown_ids_are_named(photos: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path) -> None:
    rows = [("photo 00-0.png", "photo 77.png", 0.1)]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"]).to_csv(tmp_path / "lists.csv", index=False)
    outcome = run_job(
        "rerank", "--catalogue", photos, "--candidates", tmp_path / "lists.csv", "--model", models["random"],
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert outcome.code == 2
    assert "'photo 77.png'" in outcome.errors


def test_queries_of_their_own_catalogue_search_the_other(
    photos: Path, models: dict[str, Path], run_job: Callable, catalogue_path: Path, tmp_path: Path
) -> None:
    queries = [("asked", str(catalogue_path.parent / "07-0.png"))]
    pd.DataFrame(queries, columns=["id", "path"]).to_csv(tmp_path / "queries.csv", index=False)
    outcome = run_job(
        "rerank", "--catalogue", photos, "--query-catalogue", tmp_path / "queries.csv", "--model", models["concat"],
        *EXTRACTOR, "--out", tmp_path / "o",
    )  # fmt: skip
    assert outcome.code == 0, outcome.errors
    table = pd.read_parquet(tmp_path / "o" / "reranked.parquet")
    assert set(table["query_id"]) == {"asked"}
    assert sorted(table["gallery_id"]) == sorted(pd.read_csv(photos)["id"])


def test_an_evaluation_says_what_to_expect(
    photos: Path,
    models: dict[str, Path],
    run_job: Callable,
    catalogue_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    here = (*EXTRACTOR, "--model", models["concat"], "--num-workers", 0)
    evaluated = run_job("evaluate", "--catalogue", catalogue_path, *here, "--no-baselines", "--out", tmp_path / "e")
    assert evaluated.code == 0, evaluated.errors
    command = ("rerank", "--catalogue", photos, *here, "--out", tmp_path / "o", "--expect-from")
    outcome = run_job(*command, tmp_path / "e")
    content = json.loads((tmp_path / "o" / "expected.json").read_text())
    assert outcome.code == (3 if content["drift"]["alarm"] else 0)
    assert "expected: the right one first for " in caplog.text
    assert (content["n_labels"], content["n_labelled_queries"], content["n_queries"]) == (12, 36, 16)
    low, high = content["expected"]["cmc@1"]["ci95"]
    assert 0 <= low <= content["expected"]["cmc@1"]["mean"] <= high <= 1
    gone = run_job(*command, tmp_path / "no")
    assert (gone.code, "--expect-from" in gone.errors) == (2, True)
    other = run_job(
        "rerank", "--catalogue", photos, *EXTRACTOR, "--model", models["random"], "--num-workers", 0,
        "--out", tmp_path / "p", "--expect-from", tmp_path / "e",
    )  # fmt: skip
    assert (other.code, "evaluated with another model" in other.errors) == (2, True)
    assert not (tmp_path / "p").exists()
