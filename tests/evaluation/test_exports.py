"""Exports of an evaluation folder: other tools find our figures in them."""

from pathlib import Path

import ir_measures
import numpy as np
import pytest
from planted_runs import planted_catalogue, planted_ranking, write_run
from ranx import Qrels, Run
from ranx import evaluate as ranx_evaluate
from small_catalogue import EXTRACTOR, concat_model, make_catalogue

from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.config.evaluation import FirstStageConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.exports import export_markdown, export_trec, relevant_ids
from distributed_rerank.evaluation.run import evaluate

OURS_TO_IR_MEASURES = {
    "cmc@1": "Success@1", "cmc@5": "Success@5", "precision@5": "P@5", "recall@10": "R@10", "mrr": "RR",
    "map@10": "AP@10",
}  # fmt: skip
OURS_TO_RANX = {
    "cmc@1": "hit_rate@1", "cmc@5": "hit_rate@5", "precision@5": "precision@5", "recall@10": "recall@10", "mrr": "mrr",
    "map@10": "map@10",
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """TREC files and metrics of a run whose distances have ties in every list."""
    folder = tmp_path_factory.mktemp("exports")
    catalogue = planted_catalogue(folder / "catalogue")
    before = planted_ranking(catalogue, {"books": 0.5, "toys": 0.9}, seed=1)
    after = planted_ranking(catalogue, {"books": 0.1, "cups": 0.3}, seed=2)
    metrics = write_run(folder / "run", catalogue, before, after)
    files = export_trec(folder / "run", catalogue, folder / "trec")
    assert [file.name for file in files] == ["first_stage.trec", "reranked.trec", "qrels.trec"]
    return folder, metrics


@pytest.mark.parametrize(("side", "name"), [("first_stage", "first_stage.trec"), ("reranked", "reranked.trec")])
def test_ir_measures_of_the_export_are_our_figures(
    exported: tuple[Path, dict[str, dict[str, float]]], side: str, name: str
) -> None:
    folder, metrics = exported
    qrels = list(ir_measures.read_trec_qrels(str(folder / "trec" / "qrels.trec")))
    run = list(ir_measures.read_trec_run(str(folder / "trec" / name)))
    wanted = {key: ir_measures.parse_measure(text) for key, text in OURS_TO_IR_MEASURES.items()}
    found = ir_measures.calc_aggregate(wanted.values(), qrels, run)
    assert {key: found[measure] for key, measure in wanted.items()} == pytest.approx(
        {key: metrics[side][key] for key in wanted}, abs=1e-9
    )


@pytest.mark.parametrize(("side", "name"), [("first_stage", "first_stage.trec"), ("reranked", "reranked.trec")])
def test_ranx_of_the_export_gives_our_figures(
    exported: tuple[Path, dict[str, dict[str, float]]], side: str, name: str
) -> None:
    folder, metrics = exported
    qrels = Qrels.from_file(str(folder / "trec" / "qrels.trec"), kind="trec")
    run = Run.from_file(str(folder / "trec" / name), kind="trec")
    found = ranx_evaluate(qrels, run, list(OURS_TO_RANX.values()))
    assert isinstance(found, dict)
    for key, theirs in OURS_TO_RANX.items():
        assert found[theirs] == pytest.approx(metrics[side][key], abs=1e-9), key


def test_export_of_a_real_evaluation_with_an_unreadable_image_gives_its_figures(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "pictures", 12, broken=(5,))
    config, work = FirstStageConfig(extractor=EXTRACTOR, n_items=8), WorkConfig(max_rejects=0.5)
    chain = Chain((PairwiseStep(top_n=4, rule="replace"),))
    metrics = evaluate(catalogue, config, tmp_path / "run", model=concat_model(), chain=chain, work=work)
    assert metrics["n_rejected"] == 1
    export_trec(tmp_path / "run", catalogue, tmp_path / "trec")
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "trec" / "qrels.trec")))
    wanted = {key: ir_measures.parse_measure(text) for key, text in OURS_TO_IR_MEASURES.items()}
    for side in ("first_stage", "reranked"):
        run = list(ir_measures.read_trec_run(str(tmp_path / "trec" / f"{side}.trec")))
        found = ir_measures.calc_aggregate(wanted.values(), qrels, run)
        assert {key: found[measure] for key, measure in wanted.items()} == pytest.approx(
            {key: metrics[side][key] for key in wanted}, abs=1e-9
        )
    export_markdown(tmp_path / "run", tmp_path / "summary.md")
    assert "1 images rejected" in (tmp_path / "summary.md").read_text()


def test_export_of_another_catalogue_is_refused_by_digest(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "one", n_labels=4)
    other = planted_catalogue(tmp_path / "other", n_labels=5)
    write_run(tmp_path / "run", catalogue, planted_ranking(catalogue, {}))
    with pytest.raises(BadInput, match=f"{catalogue.digest()[:16]}, this one is {other.digest()[:16]}"):
        export_trec(tmp_path / "run", other, tmp_path / "trec")


def test_export_of_a_first_stage_alone_has_no_second_run(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "one", n_labels=4)
    write_run(tmp_path / "run", catalogue, planted_ranking(catalogue, {}))
    assert [file.name for file in export_trec(tmp_path / "run", catalogue, tmp_path / "trec")] == [
        "first_stage.trec",
        "qrels.trec",
    ]


def test_relevant_ids_leave_out_the_query_and_its_sequence(tmp_path: Path) -> None:
    rows = ["id,path,label,split,is_query,is_gallery,sequence"]
    cells = ["a x 1 1", "b x 1 1", "c x 1 2", "d x 0 3", "e y 1 4", "f x 1 5"]
    for name, label, gallery, sequence in map(str.split, cells):
        rows.append(f"{name},{name}.png,{label},validation,1,{gallery},{sequence}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    catalogue = read_catalogue(str(tmp_path / "table.csv"), purpose="evaluation")
    assert dict(relevant_ids(catalogue, ["a", "d"], [2, 4])) == {"a": ["c", "f"], "d": ["a", "b", "c", "f"]}


def test_markdown_has_a_row_for_every_metric_and_the_verdict_first(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue")
    before, after = planted_ranking(catalogue, {"books": 0.9}), planted_ranking(catalogue, {})
    metrics = write_run(tmp_path / "run", catalogue, before, after)
    export_markdown(tmp_path / "run", tmp_path / "summary" / "summary.md")
    lines = (tmp_path / "summary" / "summary.md").read_text().splitlines()
    assert lines[0].startswith("**The right item comes first for ")
    assert " Re-ranking helps: mAP@10 rises from" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(metrics["first_stage"])
    assert {len(row) for row in rows} == {5}
    row = next(row for row in rows if row[0] == "CMC@1")
    assert row[1:3] == [f"{metrics[side]['cmc@1']:.3f}" for side in ("first_stage", "reranked")]
    low, high = metrics["difference"]["cmc@1"]["ci95"]
    assert row[4] == f"+{low:.3f} to +{high:.3f}"
    assert np.isclose(float(row[3]), metrics["difference"]["cmc@1"]["mean"], atol=6e-4)


def test_markdown_of_a_first_stage_alone_has_two_columns(tmp_path: Path) -> None:
    catalogue = planted_catalogue(tmp_path / "catalogue", n_labels=4)
    write_run(tmp_path / "run", catalogue, planted_ranking(catalogue, {}))
    export_markdown(tmp_path / "run", tmp_path / "summary.md")
    assert "| CMC@1 | 1.000 |" in (tmp_path / "summary.md").read_text()
