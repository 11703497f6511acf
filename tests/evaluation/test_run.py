"""The evaluation as a whole in one process: what decides its folder, and given candidates."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_catalogue import EXTRACTOR, distance_model, make_catalogue

from distributed_rerank.chain.chain import AdaptStep, Chain, PairwiseStep
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.models.adapter import fit_adapters
from distributed_rerank.reranking.first_stage import check_depth, first_stage_settings
from distributed_rerank.runtime.devices import tensor_of

CONFIG = FirstStageConfig(extractor=EXTRACTOR, n_items=5)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return make_catalogue(tmp_path_factory.mktemp("photos"), 12)


def test_settings_of_memory_threads_and_places_do_not_count() -> None:
    settings = first_stage_settings(CONFIG, WorkConfig())
    free = WorkConfig(
        max_rejects=0.5, tile_size=9, threads_per_worker=2, encoding_gb=9.0, decode_threads=4, blocks_per_call=3
    )
    assert first_stage_settings(replace(CONFIG, embeddings=Path("elsewhere")), free) == settings
    assert free.fingerprint_settings("score") == WorkConfig().fingerprint_settings("score")
    assert first_stage_settings(CONFIG, WorkConfig(images_per_batch=3)) != settings
    assert WorkConfig(pairs_per_batch=3).fingerprint_settings("score") != WorkConfig().fingerprint_settings("score")
    assert first_stage_settings(FirstStageConfig(embeddings=Path("e")), WorkConfig())["extraction"] is None
    json.dumps(settings)


def test_settings_of_content_of_the_weights_counts_not_their_path(tmp_path: Path) -> None:
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(content)
    extractors = [replace(EXTRACTOR, weights=str(tmp_path / name)) for name in ("a.pth", "b.pth", "c.pth")]
    a, b, c = (first_stage_settings(replace(CONFIG, extractor=e), WorkConfig()) for e in extractors)
    assert a == b != c


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (MeasureConfig, {"ks": ()}),
        (MeasureConfig, {"ks": (0, 1)}),
        (WorkConfig, {"max_rejects": 2.0}),
        (WorkConfig, {"images_per_batch": 0}),
        (FirstStageConfig, {"n_items": 0}),
    ],
)
def test_config_wrong_values_are_refused(kind: type, wrong: dict) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        kind(**wrong)


def test_config_without_anything_to_search_with_is_refused() -> None:
    with pytest.raises(BadInput, match="--extractor, --embeddings or --candidates"):
        FirstStageConfig().check_files()


def test_check_depth_counts_what_is_searched_for() -> None:
    with pytest.raises(BadInput, match="top_n=6 exceeds the 5 retrieved"):
        check_depth(CONFIG, Chain((PairwiseStep(top_n=6),)))
    check_depth(CONFIG, Chain((PairwiseStep(top_n=5),)))
    check_depth(replace(CONFIG, candidates=Path("lists.csv")), Chain((PairwiseStep(top_n=6),)))


def test_evaluate_same_model_other_bias_is_another_folder(catalogue: Catalogue, tmp_path: Path) -> None:
    model, chain = distance_model(), Chain((PairwiseStep(top_n=3, rule="replace"),))
    metrics = evaluate(catalogue, CONFIG, tmp_path / "e", model=model, chain=chain)
    assert metrics == json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert evaluate(catalogue, CONFIG, tmp_path / "e", model=model, chain=chain) == metrics
    model.config = replace(model.config, output_bias=0.5)
    with pytest.raises(BadInput, match="output_bias"):
        evaluate(catalogue, CONFIG, tmp_path / "e", model=model, chain=chain)


def test_evaluate_given_lists_lose_query_and_gaps(catalogue: Catalogue, tmp_path: Path) -> None:
    ids = catalogue.ids
    rows = [(ids[0], ids[n], 0.1 * n) for n in (0, 1, 2)] + [(ids[5], ids[4], 0.2)]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"]).to_parquet(tmp_path / "lists.parquet")
    config = FirstStageConfig(candidates=tmp_path / "lists.parquet", missing_lists="miss")
    metrics = evaluate(catalogue, config, tmp_path / "e")
    table = pd.read_parquet(tmp_path / "e" / "per_query.parquet").set_index("query_id")
    assert metrics["n_without_list"] == 10
    assert metrics["n_queries"] == 12, "a query without a list found nothing, it is not left out"
    assert table["cmc@1_before"][[ids[0], ids[5]]].tolist() == [1, 1]
    assert table["first_hit_before"].notna().sum() == 2
    assert metrics["first_stage"]["cmc@1"] == pytest.approx(2 / 12)


def test_evaluate_query_that_is_none_is_named(catalogue: Catalogue, tmp_path: Path) -> None:
    partial = Catalogue(catalogue.table.assign(is_query=np.arange(12) > 0), "photos.csv")
    rows = [(catalogue.ids[0], catalogue.ids[1], 0.1)]
    pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"]).to_csv(tmp_path / "lists.csv", index=False)
    with pytest.raises(BadInput, match=r"1 queries are not marked is_query.*picture_000\.png"):
        evaluate(partial, FirstStageConfig(candidates=tmp_path / "lists.csv"), tmp_path / "e")


def test_evaluate_without_queries_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    partial = Catalogue(catalogue.table.assign(is_query=False), "photos.csv")
    with pytest.raises(BadInput, match="is_query"):
        evaluate(partial, CONFIG, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_chain_that_adapts_searches_over_mapped_embeddings(catalogue: Catalogue, tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((len(catalogue), 6)).astype(np.float32)
    table = tmp_path / "embeddings.parquet"
    write_embeddings(table, catalogue.ids, matrix)
    (adapter,) = fit_adapters(torch.from_numpy(matrix), tensor_of(catalogue.labels).long(), [("whiten", 0.0)])
    assert adapter is not None
    write_embeddings(tmp_path / "mapped.parquet", catalogue.ids, adapter(matrix))
    config = FirstStageConfig(embeddings=table, n_items=5)
    chain = Chain((AdaptStep(), PairwiseStep(top_n=4, rule="replace")), adapter=adapter)
    metrics = evaluate(catalogue, config, tmp_path / "chain", model=distance_model(), chain=chain)
    plain = evaluate(catalogue, config, tmp_path / "plain")
    mapped = evaluate(catalogue, replace(config, embeddings=tmp_path / "mapped.parquet"), tmp_path / "mapped")
    assert metrics["first_stage"] == plain["first_stage"]
    assert mapped["first_stage"]["map@10"] > plain["first_stage"]["map@10"]
    adapted = metrics["baselines"]["adapted"]["metrics"]
    assert adapted == {key: mapped["first_stage"][key] for key in adapted}
    over_mapped = evaluate(
        catalogue, replace(config, embeddings=tmp_path / "mapped.parquet"), tmp_path / "both", model=distance_model(),
        chain=Chain((PairwiseStep(top_n=4, rule="replace"),)),
    )  # fmt: skip
    assert metrics["reranked"] == over_mapped["reranked"]
    assert metrics["oracle"] == over_mapped["oracle"]
    assert [entry["step"] for entry in metrics["steps"]] == ["adapt", "pairwise"]
    assert [entry["pairs"] for entry in metrics["steps"]] == [0, metrics["cost"]["pairs"]]
    assert metrics["steps"][0]["metrics"] == adapted
    assert metrics["steps"][1]["metrics"]["map@10"] == metrics["reranked"]["map@10"]
    added = sum(entry["difference"]["map@10"]["mean"] for entry in metrics["steps"])
    assert added == pytest.approx(metrics["difference"]["map@10"]["mean"])
    assert "The adapted first stage alone" in (tmp_path / "chain" / "report.html").read_text()
    alone = evaluate(catalogue, config, tmp_path / "alone", chain=Chain((AdaptStep(),), adapter=adapter))
    assert alone["reranked"] == mapped["first_stage"]


def test_lists_of_another_system_get_the_distances_of_mapped_embeddings(catalogue: Catalogue, tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((len(catalogue), 6)).astype(np.float32)
    (adapter,) = fit_adapters(torch.from_numpy(matrix), tensor_of(catalogue.labels).long(), [("whiten", 0.0)])
    assert adapter is not None
    write_embeddings(tmp_path / "embeddings.parquet", catalogue.ids, matrix)
    n = len(catalogue)
    pairs = [(query, gallery) for query in range(n) for gallery in range(n) if query != gallery]
    names = catalogue.ids[np.array(pairs)]
    lists = pd.DataFrame({"query_id": names[:, 0], "gallery_id": names[:, 1], "distance": np.arange(len(pairs)) + 1.0})
    lists.to_parquet(tmp_path / "lists.parquet")
    config = FirstStageConfig(embeddings=tmp_path / "embeddings.parquet", candidates=tmp_path / "lists.parquet")
    chain = Chain((AdaptStep(),), adapter=adapter)
    given = evaluate(catalogue, config, tmp_path / "given", chain=chain)
    searched = evaluate(catalogue, replace(config, candidates=None), tmp_path / "searched", chain=chain)
    assert given["reranked"] == searched["reranked"]
    assert given["first_stage"] != given["reranked"]
    without = evaluate(catalogue, replace(config, embeddings=None), tmp_path / "without", chain=chain)
    assert without["reranked"] == without["first_stage"] == given["first_stage"]


def test_figures_by_item_count_photos_of_one_thing_once(catalogue: Catalogue, tmp_path: Path) -> None:
    by_item = Catalogue(catalogue.table.assign(item=["a", "a", "b", "b"] + ["c"] * 4 + [None] * 4), catalogue.source)
    model, chain = distance_model(), Chain((PairwiseStep(top_n=4, rule="replace"),))
    metrics = evaluate(by_item, CONFIG, tmp_path / "e", model=model, chain=chain)
    assert metrics["items"]["n_items"] == 7
    assert metrics["items"]["combination"] == "best"
    lists = pd.read_parquet(tmp_path / "e" / "candidates" / "candidates.parquet")
    things = dict(zip(by_item.ids, by_item.thing_names[by_item.things], strict=True))
    labels = dict(zip(by_item.ids, by_item.labels, strict=True))
    first = {query: rows["gallery_id"].iloc[0] for query, rows in lists.groupby("query_id")}
    assert metrics["items"]["first_stage"]["cmc@1"] == np.mean([labels[q] == labels[g] for q, g in first.items()])
    recall = []
    for query, rows in lists.groupby("query_id"):
        found = {things[id] for id in rows["gallery_id"] if labels[id] == labels[query]}
        wanted = {things[id] for id in by_item.ids if id != query and labels[id] == labels[query]}
        recall.append(len(found) / len(wanted))
    assert metrics["items"]["first_stage"]["recall@5"] == pytest.approx(np.mean(recall))
    assert "By item" in (tmp_path / "e" / "report.html").read_text()
    assert "items" not in evaluate(catalogue, CONFIG, tmp_path / "plain", model=model, chain=chain)
    combining = replace(chain, calibration={"slope": 5.0, "intercept": 1.0}, views="mean")
    combined = evaluate(by_item, CONFIG, tmp_path / "mean", model=model, chain=combining)["items"]
    gain = combined["reranked"]["map@10"] - metrics["items"]["reranked"]["map@10"]
    assert combined["against_best_photo"]["map@10"]["mean"] == pytest.approx(gain)
    assert "mean probability of its photos" in (tmp_path / "mean" / "report.html").read_text()
