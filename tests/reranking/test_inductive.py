"""The answer to a query does not depend on the other queries of the catalogue or of the lists that were given."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_rerank.chain.chain import (
    AdaptStep,
    AlphaQEStep,
    Chain,
    ChainStep,
    KReciprocalStep,
    NeighbourhoodStep,
    PairwiseStep,
    QueryExpansionStep,
)
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.reranking.lists import needs_joint_lists

N, DIM, K = 60, 8, 20
MEASURE = MeasureConfig(baselines=False)
DIRECT = NeighbourhoodStep(4.0, 3.0, kind="direct", k1=8, k2=3)
RECIPROCAL = NeighbourhoodStep(4.0, 3.0, kind="reciprocal", k1=8, k2=3)
EXPANSION = QueryExpansionStep(4.0, 3.0, k=4)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    matrix = np.random.default_rng(0).normal(size=(N, DIM)) + 2 * np.eye(12)[np.arange(N) % 12][:, :DIM]
    matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    write_embeddings(folder / "embeddings.parquet", np.array([f"{i:02d}" for i in range(N)], dtype=object), matrix)
    return folder / "embeddings.parquet"


def catalogue_of(folder: Path, is_query: np.ndarray, is_gallery: np.ndarray) -> Catalogue:
    folder.mkdir()
    table = pd.DataFrame({"id": [f"{i:02d}" for i in range(N)], "path": "a.png", "label": np.arange(N) % 12})
    table = table.assign(split="validation", is_query=is_query, is_gallery=is_gallery)
    table[is_query | is_gallery].to_csv(folder / "df.csv", index=False)
    return read_catalogue(str(folder / "df.csv"), purpose="evaluation")


def answers(catalogue: Catalogue, config: FirstStageConfig, step: ChainStep, out: Path) -> pd.DataFrame:
    evaluate(catalogue, config, out, chain=Chain((step,)), measure=MEASURE)
    return pq.read_table(out / "reranked.parquet").to_pandas()


@pytest.mark.parametrize("step", [DIRECT, EXPANSION, AlphaQEStep(k=4)], ids=["direct", "expansion", "alpha_qe"])
def test_queries_outside_the_gallery_get_the_same_answers_alone_and_among_others(
    tmp_path: Path, embeddings: Path, step: ChainStep
) -> None:
    is_query = np.arange(N) % 5 == 0
    alone = is_query & (np.arange(N) < 20)
    config = FirstStageConfig(embeddings=embeddings, n_items=K)
    many = answers(catalogue_of(tmp_path / "many", is_query, ~is_query), config, step, tmp_path / "a")
    few = answers(catalogue_of(tmp_path / "few", alone, ~is_query), config, step, tmp_path / "b")
    assert few["query_id"].nunique() == 4
    assert (many.groupby("query_id").size() == K).all(), "no candidate is lost"
    pd.testing.assert_frame_equal(few, many[many["query_id"].isin(few["query_id"])].reset_index(drop=True))


@pytest.mark.parametrize("step", [DIRECT, RECIPROCAL, EXPANSION, KReciprocalStep(k1=8, k2=3)], ids=str)
def test_queries_of_the_gallery_get_the_same_answers_alone_and_among_others(
    tmp_path: Path, embeddings: Path, step: ChainStep
) -> None:
    everyone = np.ones(N, bool)
    config = FirstStageConfig(embeddings=embeddings, n_items=K)
    many = answers(catalogue_of(tmp_path / "many", everyone, everyone), config, step, tmp_path / "a")
    few = answers(catalogue_of(tmp_path / "few", np.arange(N) < 12, everyone), config, step, tmp_path / "b")
    pd.testing.assert_frame_equal(few, many[many["query_id"].isin(few["query_id"])].reset_index(drop=True))


def test_given_lists_of_some_queries_get_the_answers_of_all(tmp_path: Path, embeddings: Path) -> None:
    everyone = np.ones(N, bool)
    catalogue = catalogue_of(tmp_path / "many", everyone, everyone)
    many = answers(catalogue, FirstStageConfig(embeddings=embeddings, n_items=K), DIRECT, tmp_path / "a")
    lists = pq.read_table(tmp_path / "a" / "candidates" / "candidates.parquet").to_pandas()
    some = lists[lists["query_id"] < "12"]
    pq.write_table(pa.Table.from_pandas(some, preserve_index=False), tmp_path / "some.parquet")
    given = FirstStageConfig(embeddings=embeddings, candidates=tmp_path / "some.parquet", missing_lists="leave_out")
    few = answers(catalogue, given, DIRECT, tmp_path / "b")
    assert few["query_id"].nunique() == 12
    pd.testing.assert_frame_equal(few, many[many["query_id"].isin(few["query_id"])].reset_index(drop=True))
    without = FirstStageConfig(candidates=tmp_path / "some.parquet", missing_lists="leave_out")
    with pytest.raises(BadInput, match="looks at neighbourhoods and needs embeddings"):
        answers(catalogue, without, DIRECT, tmp_path / "c")


def test_only_reciprocal_neighbours_of_outside_queries_need_joint_lists(tmp_path: Path) -> None:
    is_query = np.arange(N) < 10
    outside = catalogue_of(tmp_path / "outside", is_query, ~is_query)
    inside = catalogue_of(tmp_path / "inside", is_query, np.ones(N, bool))
    for step, is_joint in ((DIRECT, False), (EXPANSION, False), (RECIPROCAL, True), (KReciprocalStep(), True)):
        # A map of the embeddings before the search looks at one image at a time, whatever its kind is.
        for before in ((), (AdaptStep(),), (AdaptStep(kind="discriminate"),)):
            assert needs_joint_lists(Chain((*before, step)), outside) == is_joint
            assert not needs_joint_lists(Chain((*before, step)), inside)
    assert not needs_joint_lists(Chain((PairwiseStep(top_n=5),)), outside)
