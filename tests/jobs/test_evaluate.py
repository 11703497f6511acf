"""jobs/evaluate.py against literal loops over what jobs/embed.py wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from job_files import EXTRACTOR


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded") / "embeddings"


@pytest.fixture
def embeddings(embedded: Path, catalogue_path: Path, run_job: Callable) -> Path:
    """The embeddings of the catalogue by jobs/embed.py; made once."""
    outcome = run_job("embed", "--catalogue", catalogue_path, "--out", embedded, *EXTRACTOR, "--images-per-block", 10)
    assert outcome.code == 0, outcome.errors
    return embedded


def validation(catalogue_path: Path) -> pd.DataFrame:
    table = pd.read_csv(catalogue_path, dtype=str, keep_default_na=False)
    return table[table["split"] == "validation"].reset_index(drop=True)


def is_candidate(query: pd.Series, other: pd.Series) -> bool:
    same_sequence = query["sequence"] != "" and query["sequence"] == other["sequence"]
    return other["is_gallery"] == "True" and other["path"] != query["path"] and not same_sequence


def rankings(catalogue_path: Path, embeddings: Path) -> dict[str, list[str]]:
    """Gallery ids of each query by (distance, id), by a loop over all pairs."""
    frame = pd.read_parquet(embeddings / "embeddings.parquet").set_index("id")["embedding"]
    rows = [row for _, row in validation(catalogue_path).iterrows()]
    found = {}
    for query in rows:
        if query["is_query"] != "True":
            continue
        others = [row["path"] for row in rows if is_candidate(query, row)]
        distances = {id: float(np.linalg.norm(frame[query["path"]] - frame[id])) for id in others}
        found[query["path"]] = sorted(others, key=lambda id: (distances[id], id))
    return found


def literal_metrics(ranked: dict[str, list[str]], label_of: dict[str, str]) -> dict[str, float]:
    """cmc@k, precision@k, map@k and mrr by their definitions, one query after the other."""
    values: dict[str, list[float]] = {}
    for query, ids in ranked.items():
        hits = [label_of[id] == label_of[query] for id in ids]
        n_relevant = sum(hits)
        if n_relevant == 0:
            continue
        for k in (1, 5, 10):
            precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(k) if hits[i]]
            values.setdefault(f"cmc@{k}", []).append(float(any(hits[:k])))
            values.setdefault(f"precision@{k}", []).append(sum(hits[:k]) / k)
            values.setdefault(f"recall@{k}", []).append(sum(hits[:k]) / n_relevant)
            values.setdefault(f"map@{k}", []).append(sum(precisions) / min(k, n_relevant))
        values.setdefault("mrr", []).append(1 / (hits.index(True) + 1))
    return {key: float(np.mean(column)) for key, column in values.items()}


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_first_stage_equals_loop_over_embeddings(
    catalogue_path: Path, embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    outcome = run_job("evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "e", "--embeddings", embeddings)
    assert outcome.code == 0, outcome.errors
    metrics = read(tmp_path / "e")
    table = validation(catalogue_path)
    ranked = rankings(catalogue_path, embeddings)
    expected = literal_metrics(ranked, dict(zip(table["path"], table["label"], strict=True)))
    assert {key: metrics["first_stage"][key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected["map@10"] < 0.95, "a catalogue on which everything is easy shows nothing"
    assert (metrics["n_queries"], metrics["n_gallery"], metrics["n_rejected"]) == (len(ranked), 36, 0)
    assert "reranked" not in metrics


def test_per_query_table_alone_gives_metrics(
    catalogue_path: Path, models: dict[str, Path], embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    run_job(
        "evaluate", "--catalogue", catalogue_path, "--out", tmp_path / "e", "--embeddings", embeddings,
        "--model", models["concat"], "--price-per-worker-hour", 2.5,
    )  # fmt: skip
    metrics, table = read(tmp_path / "e"), pd.read_parquet(tmp_path / "e" / "per_query.parquet")
    assert metrics["top_n"] == 6
    assert len(table) == metrics["n_queries"]
    for side, name in (("before", "first_stage"), ("after", "reranked")):
        means = {key: table[f"{key}_{side}"].mean() for key in metrics[name]}
        assert means == pytest.approx(metrics[name], abs=1e-12)
        for category, rows in table.groupby("category"):
            means = {key: rows[f"{key}_{side}"].mean() for key in metrics[name]}
            assert means == pytest.approx(metrics["categories"][category][name], abs=1e-12)
    for key, difference in metrics["difference"].items():
        gain = table[f"{key}_after"] - table[f"{key}_before"]
        assert difference["mean"] == pytest.approx(gain.mean(), abs=1e-12)
        assert (difference["n_better"], difference["n_worse"]) == ((gain > 0).sum(), (gain < 0).sum())
    assert any(difference["n_better"] + difference["n_worse"] for difference in metrics["difference"].values())
    for category, rows in table.groupby("category"):
        gain = rows["map@10_after"] - rows["map@10_before"]
        found = metrics["categories"][category]["difference"]["map@10"]
        assert (found["n_better"], found["n_worse"], found["n_equal"]) == (
            (gain > 0).sum(), (gain < 0).sum(), (gain == 0).sum()
        )  # fmt: skip
    measured = {name: entry for name, entry in metrics["baselines"].items() if "metrics" in entry}
    assert {"query_expansion", "database_augmentation", "k_reciprocal", "pairwise+query_expansion"} <= set(measured)
    for name, entry in measured.items():
        for key, mean in entry["metrics"].items():
            own = table[f"{key}_{name}"]
            assert own.mean() == pytest.approx(mean, abs=1e-12)
            gain = own - table[f"{key}_before"]
            assert gain.mean() == pytest.approx(entry["difference"][key]["mean"], abs=1e-12)
            change = own - table[f"{key}_after"]
            assert change.mean() == pytest.approx(entry["against_reranked"][key]["mean"], abs=1e-12)
    adaptive, is_skipped = metrics["adaptive"], table["adaptive_skipped"] == 1
    mixed = table["map@10_after"].where(~is_skipped, table["map@10_before"])
    assert mixed.mean() == pytest.approx(adaptive["adaptive"], abs=1e-12)
    assert is_skipped.sum() == adaptive["n_skipped"]
    assert adaptive["pairs"] == metrics["cost"]["pairs"] == metrics["curve"][-1]["pairs"] == 6 * len(table)
    timings = json.loads((tmp_path / "e" / "timings.json").read_text())
    assert set(timings["baselines"]) == set(measured), "the concat model's chain is its pairwise step"
    assert [point["top_n"] for point in timings["curve"]] == [point["top_n"] for point in metrics["curve"]]
    assert all(point["price_per_1000_queries"] > 0 for point in timings["curve"])


def test_rerank_invariants_hold_for_heads_and_tails(
    catalogue_path: Path, models: dict[str, Path], embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    """OML conformance case 7: heads are permuted, tails stay, cmc@top_n and precision@top_n are unchanged."""
    common = ["--catalogue", catalogue_path, "--embeddings", embeddings]
    for name in ("identity", "concat"):
        outcome = run_job(
            "evaluate", *common, "--out", tmp_path / name, "--model", models[name], "--chain", "replace", "--top-n", 5
        )
        assert outcome.code == 0, outcome.errors
        metrics = read(tmp_path / name)
        for key in ("cmc@5", "precision@5"):
            assert metrics["first_stage"][key] == metrics["reranked"][key]
        before = pd.read_parquet(tmp_path / name / "candidates" / "candidates.parquet")
        after = pd.read_parquet(tmp_path / name / "reranked.parquet")
        lists = {side: frame.groupby("query_id")["gallery_id"].agg(list) for side, frame in
                 (("before", before), ("after", after))}  # fmt: skip
        for query in lists["before"].index:
            assert sorted(lists["after"][query][:5]) == sorted(lists["before"][query][:5])
            assert lists["after"][query][5:] == lists["before"][query][5:]
        is_same = (lists["before"] == lists["after"]).all()
        assert is_same == (name == "identity")
    identity = read(tmp_path / "identity")
    assert identity["first_stage"] == identity["reranked"]


def test_top_n_beyond_the_lists_re_orders_whole_rows(
    catalogue_path: Path, models: dict[str, Path], embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    """OML conformance case 4: a top_n of 100 with 35 items in the gallery takes whole rows."""
    outcome = run_job(
        "evaluate", "--catalogue", catalogue_path, "--embeddings", embeddings, "--out", tmp_path / "e",
        "--model", models["random"], "--chain", "replace", "--top-n", 100,
    )  # fmt: skip
    assert outcome.code == 0, outcome.errors
    before = pd.read_parquet(tmp_path / "e" / "candidates" / "candidates.parquet")
    pairs = pd.read_parquet(tmp_path / "e" / "pair_distances" / "pair_distances.parquet")
    after = pd.read_parquet(tmp_path / "e" / "reranked.parquet")
    assert set(zip(pairs["query_id"], pairs["gallery_id"], strict=True)) == set(
        zip(before["query_id"], before["gallery_id"], strict=True)
    )
    joined = after.merge(pairs, on=["query_id", "gallery_id"])
    np.testing.assert_array_equal(joined["distance"], joined["logit"])
    assert joined.groupby("query_id")["logit"].is_monotonic_increasing.all()


def test_embeddings_are_enough_without_image_files(
    catalogue_path: Path, embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    shutil.copy(catalogue_path, tmp_path / "df.csv")
    outcome = run_job(
        "evaluate", "--catalogue", tmp_path / "df.csv", "--out", tmp_path / "e", "--embeddings", embeddings
    )
    assert outcome.code == 0, outcome.errors
    assert read(tmp_path / "e")["n_rejected"] == 0


def test_candidates_of_another_system_give_its_ranking(
    catalogue_path: Path, embeddings: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path
) -> None:
    ranked = {query: ids[:8] for query, ids in rankings(catalogue_path, embeddings).items()}
    # the query itself is in the list, as most vector databases return it
    rows = [(q, id, rank / 10) for q, ids in ranked.items() for rank, id in enumerate([q, *ids])]
    frame = pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"])
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "lists.csv", index=False)
    lines = [f"{q} Q0 {id} 0 {-value} mine" for q, id, value in rows]
    (tmp_path / "lists.trec").write_text("\n".join(lines) + "\n")
    table = validation(catalogue_path)
    label_of = dict(zip(table["path"], table["label"], strict=True))
    for name in ("lists.csv", "lists.trec"):
        out = tmp_path / f"out-{name}"
        outcome = run_job(
            "evaluate", "--catalogue", catalogue_path, "--out", out, "--candidates", tmp_path / name,
            "--model", models["identity"], "--chain", "replace", "--top-n", 4,
        )  # fmt: skip
        assert outcome.code == 0, outcome.errors
        found = read(out)
        expected = {}
        for query, ids in ranked.items():
            expected[query] = float(any(label_of[id] == label_of[query] for id in ids[:5]))
        assert found["first_stage"]["cmc@5"] == pytest.approx(np.mean(list(expected.values())))
        assert found["cost"]["pairs"] == 4 * len(ranked)


def test_queries_without_relevant_items_are_counted(
    catalogue_path: Path, embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    """OML conformance case 5, in our deviation: counted and left out, never NaN."""
    table = validation(catalogue_path)
    table.loc[table["path"] == "01-0.png", "label"] = "alone"
    table.to_csv(tmp_path / "df.csv", index=False)
    run_job("evaluate", "--catalogue", tmp_path / "df.csv", "--out", tmp_path / "e", "--embeddings", embeddings)
    metrics = read(tmp_path / "e")
    assert (metrics["n_queries"], metrics["n_without_relevant"]) == (35, 1)
    assert "01-0.png" not in set(pd.read_parquet(tmp_path / "e" / "per_query.parquet")["query_id"])


def test_catalogue_of_one_query_is_evaluated(
    catalogue_path: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path
) -> None:
    """OML conformance case 4, in our deviation: OML fails with one query."""
    table = validation(catalogue_path).head(8)
    table["is_query"] = table["path"] == "00-0.png"
    table["is_gallery"] = table["path"] != "00-0.png"
    table["path"] = [str(catalogue_path.parent / name) for name in table["path"]]
    table.to_csv(tmp_path / "df.csv", index=False)
    outcome = run_job(
        "evaluate", "--catalogue", tmp_path / "df.csv", "--out", tmp_path / "e", *EXTRACTOR, "--model", models["concat"]
    )
    assert outcome.code == 0, outcome.errors
    metrics = read(tmp_path / "e")
    assert (metrics["n_queries"], metrics["n_gallery"]) == (1, 7)
    assert len(pd.read_parquet(tmp_path / "e" / "reranked.parquet")) == 7


def test_broken_image_is_rejected_and_counted(
    catalogue_path: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path
) -> None:
    shutil.copytree(catalogue_path.parent, tmp_path / "photos")
    (tmp_path / "photos" / "03-1.png").write_bytes(b"this is no picture")
    common = ["--catalogue", tmp_path / "photos" / "df.csv", "--out", tmp_path / "e", *EXTRACTOR,
              "--model", models["concat"]]  # fmt: skip
    refused = run_job("evaluate", *common, "--max-rejects", 0.01)
    assert refused.code == 2
    assert "1 of 48 images" in refused.errors
    assert "--max-rejects" in refused.errors
    assert not (tmp_path / "e").exists()
    outcome = run_job("evaluate", *common, "--max-rejects", 0.05)
    assert outcome.code == 0, outcome.errors
    rejects = pd.read_parquet(tmp_path / "e" / "rejects.parquet")
    assert rejects[["id", "stage"]].values.tolist() == [["03-1.png", "embed"]]
    metrics = read(tmp_path / "e")
    assert (metrics["n_rejected"], metrics["n_queries"], metrics["n_gallery"]) == (1, 35, 35)
    assert "03-1.png" not in set(pd.read_parquet(tmp_path / "e" / "reranked.parquet")["gallery_id"])
    manifest = json.loads((tmp_path / "e" / "embeddings" / "manifest.json").read_text())
    assert manifest["blocks"]["reused"] >= 1, "the refused run's embeddings are used"


def test_image_that_only_scoring_meets_is_rejected(
    catalogue_path: Path, embeddings: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path
) -> None:
    shutil.copytree(catalogue_path.parent, tmp_path / "photos")
    (tmp_path / "photos" / "03-1.png").unlink()
    outcome = run_job(
        "evaluate", "--catalogue", tmp_path / "photos" / "df.csv", "--out", tmp_path / "e", "--embeddings", embeddings,
        "--model", models["concat"], "--max-rejects", 0.05,
    )  # fmt: skip
    assert outcome.code == 0, outcome.errors
    rejects = pd.read_parquet(tmp_path / "e" / "rejects.parquet")
    assert rejects[["id", "stage"]].values.tolist() == [["03-1.png", "score"]]
    metrics = read(tmp_path / "e")
    assert (metrics["n_rejected"], metrics["n_queries"], metrics["n_gallery"]) == (1, 35, 35)
    reranked = pd.read_parquet(tmp_path / "e" / "reranked.parquet")
    assert "03-1.png" not in {*reranked["gallery_id"], *reranked["query_id"]}


def test_finished_folder_is_not_computed_again(
    catalogue_path: Path, embeddings: Path, run_job: Callable, tmp_path: Path
) -> None:
    common = ["--catalogue", catalogue_path, "--out", tmp_path / "e", "--embeddings", embeddings]
    run_job("evaluate", *common)
    before = (tmp_path / "e" / "metrics.json").stat().st_mtime_ns
    assert run_job("evaluate", *common).code == 0
    assert (tmp_path / "e" / "metrics.json").stat().st_mtime_ns == before
    refused = run_job("evaluate", *common, "--ks", 1, 3)
    assert refused.code == 2
    assert "--overwrite" in refused.errors
    assert run_job("evaluate", *common, "--ks", 1, 3, "--overwrite").code == 0
    assert "cmc@3" in read(tmp_path / "e")["first_stage"]


def test_scores_of_another_system_are_a_row_of_the_report(catalogue_path: Path, run_job, tmp_path: Path) -> None:
    lists = tmp_path / "lists.csv"
    table = pd.read_csv(catalogue_path, dtype=str)
    table = table[table["split"] == "validation"].assign(id=table["path"])
    rows = [
        (query.id, item.id, 0.1 * (1 + (place + 5) % 7), int(query.label == item.label))
        for query in table[table["is_query"] == "True"].itertuples()
        for place, item in enumerate(table[table["is_gallery"] == "True"].itertuples())
        if item.id != query.id
    ]
    whole = pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance", "score"])
    whole.drop(columns="score").to_csv(lists, index=False)
    scores = tmp_path / "vlm.csv"
    whole[["query_id", "gallery_id", "score"]].to_csv(scores, index=False)
    words = ["--catalogue", catalogue_path, "--candidates", lists, "--distances", "l2"]
    done = run_job("evaluate", *words, "--out", tmp_path / "o", "--external", scores)
    assert done.code == 0, done.errors
    row = json.loads((tmp_path / "o" / "metrics.json").read_text())["baselines"]["external"]
    assert row["metrics"]["cmc@1"] == 1, "the scores are the labels"
    assert row["constants"] == {"file": "vlm.csv", "unscored": 0, "queries_unscored": 0, "unused": 3}
    assert "Scores of another system" in (tmp_path / "o" / "report.html").read_text()
    scores.write_text("query_id,gallery_id,score\nno such photo,neither,1\n")
    assert run_job("evaluate", *words, "--out", tmp_path / "p", "--external", scores).code == 2
    refused = run_job("evaluate", *words, "--out", tmp_path / "p", "--unscored", "error")
    assert refused.code == 2
    assert "--external" in refused.errors
