"""Lists of other systems and embeddings of others, given to a trained model: the same answers, or one line."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from training_examples import BACKBONE, SMALL, TOKENS, draw_catalogue

from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.data.tables import write_embeddings
from distributed_rerank.data.texts import Texts
from distributed_rerank.data.trained_on import read_trained_on
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.exports import export_trec
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.extraction import embed
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import load_model
from distributed_rerank.reranking.rerank import rerank
from distributed_rerank.training.stage import train

CHAIN = Chain((PairwiseStep(6, "fuse", 2.0, 5.0),), calibration={"slope": 6.0, "intercept": 3.0})


@dataclass(frozen=True)
class Trained:
    """A trained model, its catalogue, embeddings and first-stage lists."""

    folder: Path
    catalogue: Catalogue
    model: PairwiseModel
    lists: pd.DataFrame

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    catalogue = draw_catalogue(folder / "images")
    train(catalogue, TOKENS, replace(SMALL, epochs=1), folder / "model", embeddings_folder=folder / "embeddings")
    model = load_model(folder / "model")
    items = catalogue.as_query_and_gallery()
    first = FirstStageConfig(embeddings=folder / "embeddings", n_items=12)
    rerank(items, first, folder / "first", model=model, chain=Chain())
    lists = pd.read_parquet(folder / "first" / "candidates" / "candidates.parquet")
    return Trained(folder, items, model, lists)


def stored(folder: Path) -> tuple[Texts, np.ndarray]:
    """Ids and values of a folder of embeddings."""
    embeddings = read_embeddings(folder)
    return embeddings.ids, embeddings.matrix[:]


Rerank = Callable[..., pd.DataFrame]


@pytest.fixture
def reranked(trained: Trained, tmp_path: Path) -> Rerank:
    """`reranked(column, values, **config)`: reranked.parquet of the first stage's lists with these values."""
    runs = iter(range(100))

    def run(column: str, values: pd.Series, chain: Chain = CHAIN, **config: object) -> pd.DataFrame:
        lists = tmp_path / "lists.csv"
        trained.lists[["query_id", "gallery_id"]].assign(**{column: values}).to_csv(lists, index=False)
        first = FirstStageConfig(candidates=lists, **config)  # pyright: ignore[reportArgumentType]
        table = rerank(trained.catalogue, first, tmp_path / str(next(runs)), model=trained.model, chain=chain)
        return table.to_pandas()

    return run


def five_kinds(lists: pd.DataFrame) -> dict[str, tuple[str, pd.Series]]:
    distance = lists["distance"].astype(float)
    cosine = 1 - distance**2 / 2
    return {
        "l2": ("distance", distance), "squared_l2": ("distance", distance**2), "cosine": ("score", cosine),
        "one_minus_cosine": ("distance", 1 - cosine), "inner_product": ("score", cosine),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["squared_l2", "cosine", "one_minus_cosine", "inner_product"])
@pytest.mark.parametrize("has_embeddings", [False, True])
def test_five_kinds_of_distances_give_the_same_answers(
    kind: str, has_embeddings: bool, trained: Trained, reranked: Rerank
) -> None:
    embeddings = trained.embeddings if has_embeddings else None
    expected = reranked("distance", trained.lists["distance"], distances="l2")
    found = reranked(*five_kinds(trained.lists)[kind], distances=kind, embeddings=embeddings)
    names = ["query_id", "gallery_id", "rank"]
    assert found[names].equals(expected[names])
    for name in ("probability", "distance", "first_stage_distance"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, rtol=0)


def test_kind_is_guessed_and_told(trained: Trained, reranked: Rerank, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = reranked("distance", trained.lists["distance"])
    assert "is taken for l2, which is a guess" in caplog.text
    found = reranked(*five_kinds(trained.lists)["cosine"])
    assert "is taken for cosine, which is a guess" in caplog.text
    np.testing.assert_allclose(found["probability"], expected["probability"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["squared_l2", "one_minus_cosine", "percent", "rank", "bm25"])
def test_other_numbers_are_refused_or_computed_from_embeddings(
    kind: str, trained: Trained, reranked: Rerank, caplog: pytest.LogCaptureFixture
) -> None:
    forms = five_kinds(trained.lists) | {
        "percent": ("score", 100 * five_kinds(trained.lists)["cosine"][1]),
        "rank": ("score", 1 / (60 + trained.lists["rank"])),
        "bm25": ("score", 20.0 - trained.lists["rank"]),
    }
    with pytest.raises(BadInput, match="--distances") as refused:
        reranked(*forms[kind])
    assert "--embeddings" in str(refused.value)
    if kind in five_kinds(trained.lists):
        assert f"they look like {kind}" in str(refused.value)
    found = reranked(*forms[kind], embeddings=trained.embeddings)
    assert "the distances are computed from the embeddings" in caplog.text
    expected = reranked("distance", trained.lists["distance"])
    np.testing.assert_allclose(found["probability"], expected["probability"], atol=1e-6, rtol=0)


def test_only_the_order_of_the_numbers_matters_to_some_chains(trained: Trained, reranked: Rerank) -> None:
    found = reranked("score", 20.0 - trained.lists["rank"], chain=Chain())
    lists = trained.lists.sort_values(["query_id", "rank"])
    assert found["gallery_id"].tolist() == lists["gallery_id"].tolist()


def test_told_kind_that_the_embeddings_contradict_is_refused(trained: Trained, reranked: Rerank) -> None:
    with pytest.raises(BadInput, match="from the distances of the embeddings"):
        reranked("distance", trained.lists["distance"], distances="squared_l2", embeddings=trained.embeddings)


def test_told_kind_of_an_impossible_scale_is_refused(trained: Trained, reranked: Rerank) -> None:
    with pytest.raises(BadInput, match="but the training had others"):
        reranked("distance", trained.lists["distance"] / 50, distances="l2")


def test_model_folder_records_its_first_stage(trained: Trained) -> None:
    record = read_trained_on(trained.folder / "model")
    assert record is not None
    assert (record.distances, record.normalised, record.extractor["name"]) == ("l2", True, "test_resnet")
    assert record.dim == read_embeddings(trained.embeddings).matrix.shape[1]
    low, *_, high = record.spread["1"]
    assert 0 < low <= high <= record.spread["10"][-1] <= 2


def test_embeddings_of_another_extractor_are_refused(trained: Trained, tmp_path: Path) -> None:
    other = replace(BACKBONE, extractor_seed=7)
    embed(trained.catalogue, other, tmp_path / "embeddings")
    first = FirstStageConfig(embeddings=tmp_path / "embeddings")
    with pytest.raises(BadInput, match="embeddings of another extractor: weights was") as refused:
        rerank(trained.catalogue, first, tmp_path / "o", model=trained.model, chain=CHAIN)
    assert "--embeddings" in str(refused.value)
    first = FirstStageConfig(extractor=replace(BACKBONE, image_size=40))
    with pytest.raises(BadInput, match="image_size was 32, here it is 40"):
        rerank(trained.catalogue, first, tmp_path / "o2", model=trained.model, chain=CHAIN)


def test_an_extractor_beside_embeddings_must_be_theirs(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the chain needs: a flag that changes nothing is refused, or the log says so."""
    own = FirstStageConfig(embeddings=trained.embeddings, extractor=BACKBONE)
    alone = evaluate(trained.catalogue, replace(own, extractor=ExtractorConfig()), tmp_path / "alone")
    assert evaluate(trained.catalogue, own, tmp_path / "both")["first_stage"] == alone["first_stage"]
    for changed, said in (
        (replace(BACKBONE, image_size=40), "image_size was 32, here it is 40; leave --extractor out"),
        (replace(BACKBONE, extractor_seed=7), r"weights was '\w{12}', here it is '\w{12}'; leave --extractor out"),
    ):
        with pytest.raises(BadInput, match=f"of another extractor than --extractor: {said}"):
            evaluate(trained.catalogue, replace(own, extractor=changed), tmp_path / "other")
    assert "--extractor is not used" not in caplog.text
    write_embeddings(tmp_path / "e.parquet", *stored(trained.embeddings))
    of_others = replace(own, embeddings=tmp_path / "e.parquet")
    assert evaluate(trained.catalogue, of_others, tmp_path / "table")["first_stage"] == alone["first_stage"]
    assert "--extractor is not used: --embeddings " in caplog.text


def test_training_on_embeddings_of_another_extractor_names_the_options_that_help(
    trained: Trained, tmp_path: Path
) -> None:
    """Neither --overwrite nor another --out would."""
    model = replace(TOKENS, extractor=replace(BACKBONE, image_size=40))
    with pytest.raises(BadInput, match=r"image_size=32, this run has .*image_size=40; give the extractor") as refused:
        train(trained.catalogue, model, SMALL, tmp_path / "model", embeddings_folder=trained.embeddings)
    assert "another folder for --embeddings" in str(refused.value)
    assert "--overwrite" not in str(refused.value)
    assert "--out" not in str(refused.value)


def test_model_of_a_table_of_embeddings_behind_an_extractor_is_told(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows whether --extractor made the table that another program wrote, so whoever gives both is told."""
    write_embeddings(tmp_path / "e.parquet", *stored(trained.embeddings))
    train(trained.catalogue, TOKENS, replace(SMALL, epochs=1), tmp_path / "m", embeddings_folder=tmp_path / "e.parquet")
    model = load_model(tmp_path / "m")
    for folder, is_from_table in ((tmp_path / "m", True), (trained.folder / "model", False)):
        record = read_trained_on(folder)
        assert record is not None
        assert record.from_table == is_from_table
    said = "--model was trained on a table of embeddings that another program wrote"
    for number, (first, known, is_told) in enumerate([
        (FirstStageConfig(embeddings=tmp_path / "e.parquet"), model, False),
        (FirstStageConfig(embeddings=trained.embeddings), trained.model, False),
        (FirstStageConfig(embeddings=trained.embeddings), model, True),
        (FirstStageConfig(extractor=BACKBONE), model, True),
    ]):  # fmt: skip
        caplog.clear()
        rerank(trained.catalogue, first, tmp_path / str(number), model=known, chain=CHAIN)
        assert (said in caplog.text) == is_told


@pytest.mark.parametrize("change", ["length", "dim"])
def test_embeddings_of_another_length_are_refused(change: str, trained: Trained, tmp_path: Path) -> None:
    ids, matrix = stored(trained.embeddings)
    matrix = matrix * 3 if change == "length" else matrix[:, :5]
    write_embeddings(tmp_path / "embeddings.parquet", ids, matrix)
    first = FirstStageConfig(embeddings=tmp_path / "embeddings.parquet")
    words = "embeddings of length 1, these not" if change == "length" else "these have 5"
    with pytest.raises(BadInput, match=words):
        rerank(trained.catalogue, first, tmp_path / "o", model=trained.model, chain=CHAIN)
    rerank(trained.catalogue, first, tmp_path / "o", model=trained.model, chain=Chain())


def test_exported_run_has_the_order_that_was_measured(trained: Trained, tmp_path: Path) -> None:
    """Distances computed from the embeddings may order the lists anew."""
    catalogue = Catalogue(trained.catalogue.table.assign(split="validation"), "table")
    lists = trained.lists.assign(score=trained.lists["rank"] * 7.0)[["query_id", "gallery_id", "score"]]
    lists.sort_values("score", ascending=False).to_parquet(tmp_path / "lists.parquet", index=False)
    first = FirstStageConfig(candidates=tmp_path / "lists.parquet", embeddings=trained.embeddings)
    metrics = evaluate(catalogue, first, tmp_path / "o", model=trained.model, chain=CHAIN)
    export_trec(tmp_path / "o", catalogue, tmp_path / "trec", tmp_path / "lists.parquet")
    again = FirstStageConfig(candidates=tmp_path / "trec" / "first_stage.trec", embeddings=trained.embeddings)
    assert evaluate(catalogue, again, tmp_path / "o2")["first_stage"] == metrics["first_stage"]
