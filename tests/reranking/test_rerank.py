"""Re-ranking without labels in one process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from small_catalogue import EXTRACTOR, distance_model, make_catalogue

from distributed_rerank.chain.chain import Chain, KReciprocalStep, PairwiseStep
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.reranking.rerank import rerank

CONFIG = FirstStageConfig(extractor=EXTRACTOR, n_items=6)
WORK = WorkConfig(max_rejects=0.2)


def test_rerank_broken_image_leaves_all_lists(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 10, broken=(4,))
    chain = Chain((PairwiseStep(top_n=3, rule="replace"),))
    rerank(catalogue, CONFIG, tmp_path / "o", work=WORK, model=distance_model(), chain=chain)
    table = pd.read_parquet(tmp_path / "o" / "reranked.parquet")
    assert len(table) == 9 * 6
    assert catalogue.ids[4] not in {*table["query_id"], *table["gallery_id"]}
    assert pd.read_parquet(tmp_path / "o" / "rejects.parquet")["id"].tolist() == [catalogue.ids[4]]


def test_rerank_image_broken_between_stages_leaves_lists_with_one_less(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 10)
    config = replace(CONFIG, embeddings=tmp_path / "first" / "embeddings")
    rerank(
        catalogue, CONFIG, tmp_path / "first", work=WORK, model=distance_model(), chain=Chain((PairwiseStep(top_n=2),))
    )
    (tmp_path / "photos" / "picture_004.png").write_bytes(b"broken since")
    table = rerank(
        catalogue, config, tmp_path / "o", work=WORK, model=distance_model(), chain=Chain((PairwiseStep(top_n=3),))
    ).to_pandas()
    assert "picture_004.png" not in {*table["query_id"], *table["gallery_id"]}
    candidates = pd.read_parquet(tmp_path / "o" / "candidates" / "candidates.parquet")
    expected = candidates[
        (candidates["query_id"] != "picture_004.png") & (candidates["gallery_id"] != "picture_004.png")
    ]
    assert len(table) == len(expected)
    is_scored = table["logit"].notna()
    assert is_scored.sum() == (expected["rank"] <= 3).sum()
    for _, rows in table.groupby("query_id"):
        assert rows["logit"].notna().tolist() == sorted(rows["logit"].notna(), reverse=True), (
            "unscored ones stay behind"
        )
        assert rows["rank"].tolist() == list(range(1, len(rows) + 1))


def test_rerank_without_pairwise_step_has_no_logits(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 10)
    table = rerank(
        catalogue,
        CONFIG,
        tmp_path / "o",
        work=WORK,
        model=distance_model(),
        chain=Chain((KReciprocalStep(k1=3, k2=2),)),
    ).to_pandas()
    assert table["logit"].isna().all()
    assert table["probability"].isna().all()
    assert not (tmp_path / "o" / "pair_distances").exists()
    assert set(table.groupby("query_id").size()) == {6}
    assert table["distance"].groupby(table["query_id"]).is_monotonic_increasing.all()
    first = table["first_stage_rank"].groupby(table["query_id"]).apply(sorted)
    assert all(ranks == list(range(1, 7)) for ranks in first)


def test_rerank_by_a_calibrated_chain_gives_the_probability_of_its_own_distance(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 10)
    chain = Chain((PairwiseStep(top_n=4),), calibration={"slope": 0.5, "intercept": 1.0})
    table = rerank(catalogue, CONFIG, tmp_path / "o", work=WORK, model=distance_model(), chain=chain).to_pandas()
    scored = table[table["rank"] <= 4]
    np.testing.assert_allclose(scored["probability"], 1 / (1 + np.exp(0.5 * scored["distance"] - 1.0)), rtol=1e-5)
    assert table.loc[table["rank"] > 4, "probability"].isna().all()


def test_rerank_by_item_names_each_thing_once_with_its_photos(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 12)
    shown = [None, "b", "b", None, *(["c"] * 4), "d", "d", "e", "e"]
    by_item = Catalogue(catalogue.table.assign(item=shown), catalogue.source)
    chain = Chain((PairwiseStep(top_n=4),), calibration={"slope": 0.5, "intercept": 1.0}, views="noisy_or")
    table = rerank(by_item, CONFIG, tmp_path / "o", work=WORK, model=distance_model(), chain=chain).to_pandas()
    things = pd.read_parquet(tmp_path / "o" / "items.parquet")
    item_of = dict(zip(catalogue.ids, [name or id for name, id in zip(shown, catalogue.ids, strict=True)], strict=True))
    for query, rows in things.groupby("query_id"):
        photos = table[table["query_id"] == query].assign(item=lambda photos: photos["gallery_id"].map(item_of))
        assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
        assert sorted(rows["item"]) == sorted(set(photos["item"]))
        for _, row in rows.iterrows():
            own = photos[photos["item"] == row["item"]]
            assert (row["gallery_id"], row["n_photos"]) == (own["gallery_id"].iloc[0], len(own))
            known = own["probability"].dropna()
            wanted = 1 - np.prod(1 - known) if len(known) else np.nan
            np.testing.assert_allclose(row["probability"], wanted, rtol=1e-5)


def test_rerank_without_a_column_item_writes_no_items(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 8)
    rerank(catalogue, CONFIG, tmp_path / "o", work=WORK, model=distance_model(), chain=Chain((PairwiseStep(top_n=2),)))
    assert not (tmp_path / "o" / "items.parquet").exists()
