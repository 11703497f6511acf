"""Expected quality and drift of a re-ranked folder, from an evaluation of labelled queries."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_runs import planted_catalogue, planted_ranking, write_run

from distributed_rerank.data.candidates import candidates_table
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.monitoring.unlabelled import check_source, expect, in_words
from distributed_rerank.storage import artifacts, manifests
from distributed_rerank.tensors.candidate_lists import CandidateLists


def with_telling_distances(lists: CandidateLists, catalogue: Catalogue, seed: int) -> CandidateLists:
    """The lists with first candidates that are near where they are right, as good distances are."""
    is_right = catalogue.labels[lists.items[:, 0].numpy()] == catalogue.labels[lists.query_items.numpy()]
    noise = np.random.default_rng(seed).normal(size=len(is_right)) * 0.3
    first = (1.0 - 0.5 * is_right + 0.2 * noise)[:, None]
    distances = first + 0.1 * np.arange(lists.items.shape[1])
    return CandidateLists.from_arrays(lists.query_items.numpy(), lists.items.numpy(), distances.astype(np.float32))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return planted_catalogue(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="module")
def evaluation(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "evaluation"
    after = with_telling_distances(planted_ranking(catalogue, {"cups": 0.3, "toys": 0.1}), catalogue, 0)
    write_run(folder, catalogue, planted_ranking(catalogue, {}), after)
    return folder


def night(folder: Path, catalogue: Catalogue, miss: float, further: float = 0.0) -> tuple[Path, float]:
    """A folder of `rerank` of queries of which this share misses its first place, and the share that is right."""
    lists = planted_ranking(catalogue, dict.fromkeys(("books", "cups", "toys"), miss), seed=5)
    lists = with_telling_distances(lists, catalogue, 6)
    with artifacts.stage(folder, artifacts.make_fingerprint("rerank", catalogue=catalogue.digest())) as staging:
        table = candidates_table(lists, catalogue.ids)
        moved = pa.array(table["distance"].to_numpy() + np.float32(further))
        table = table.set_column(table.column_names.index("distance"), "distance", moved)
        pq.write_table(table, staging.path / "reranked.parquet")
        staging.finish()
    firsts = catalogue.labels[lists.items[:, 0].numpy()]
    return folder, float((firsts == catalogue.labels[lists.query_items.numpy()]).mean())


def test_expected_follows_the_queries_and_not_the_evaluation(
    evaluation: Path, catalogue: Catalogue, tmp_path: Path
) -> None:
    for number, miss in enumerate((0.1, 0.4)):
        folder, truth = night(tmp_path / str(number), catalogue, miss)
        content = expect(evaluation, folder)
        low, high = content["expected"]["cmc@1"]["ci95"]
        assert low <= truth <= high < low + 0.25
        assert content["expected"]["cmc@1"]["mean"] == pytest.approx(truth, abs=0.05)
        assert set(content["expected"]) == {"cmc@1", "precision@10"}
        assert content == json.loads((folder / "expected.json").read_text())
    assert content["n_labels"] == 60


def test_alarm_for_queries_that_are_further_away(evaluation: Path, catalogue: Catalogue, tmp_path: Path) -> None:
    near, _ = night(tmp_path / "near", catalogue, 0.13)
    far, _ = night(tmp_path / "far", catalogue, 0.13, further=0.3)
    contents = [expect(evaluation, folder) for folder in (near, far)]
    assert [content["drift"]["alarm"] for content in contents] == [False, True]
    assert "drift: none seen" in in_words(contents[0])
    assert "DRIFT: these queries are not like the 240 labelled queries" in in_words(contents[1])
    mean = contents[0]["expected"]["cmc@1"]["mean"]
    assert f"the right one first for {100 * mean:.0f} of 100 queries [" in in_words(contents[0])


def test_queries_without_an_answer_count_as_wrong(catalogue: Catalogue, tmp_path: Path) -> None:
    """Queries of a third of the labels have no relevant item: they are in no metric, yet they are asked."""
    after = with_telling_distances(planted_ranking(catalogue, {}), catalogue, 0)
    write_run(tmp_path / "evaluation", catalogue, planted_ranking(catalogue, {}), after)
    path = tmp_path / "evaluation" / "per_query.parquet"
    table = pq.read_table(path)
    with manifests.rewriting(path):
        kept = [not label.as_py().endswith(("1", "4", "7")) for label in table["label"]]
        pq.write_table(table.filter(pa.array(kept)), path)
    folder, _ = night(tmp_path / "night", catalogue, 0.0)
    content = expect(tmp_path / "evaluation", folder)
    assert content["expected"]["cmc@1"]["mean"] == pytest.approx(np.mean(kept), abs=0.02)


def test_other_models_and_folders_are_refused(evaluation: Path, catalogue: Catalogue, tmp_path: Path) -> None:
    check_source(evaluation, "a" * 64, None)
    with pytest.raises(BadInput, match="evaluated with another model; evaluate this one"):
        check_source(evaluation, "b" * 64, None)
    with pytest.raises(BadInput, match="evaluated with another chain"):
        check_source(evaluation, "a" * 64, {"steps": []})
    write_run(tmp_path / "plain", catalogue, planted_ranking(catalogue, {}))
    with pytest.raises(BadInput, match=r"has no reranked.parquet; give an evaluation with --model"):
        check_source(tmp_path / "plain", "a" * 64, None)
