"""Finished folders of every stage: a damaged byte in any file is found, and what they were computed with is told."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distributed_rerank import extraction, retrieval
from distributed_rerank.chain.chain import Chain, PairwiseStep, read_chain
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig, RerankerConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.extraction import EmbeddedBlock, ImageBlock, embed
from distributed_rerank.models import precision
from distributed_rerank.models.saving import load_model
from distributed_rerank.reranking.loading import load_model_and_chain
from distributed_rerank.reranking.rerank import rerank
from distributed_rerank.retrieval import retrieve
from distributed_rerank.runtime.devices import pick_device
from distributed_rerank.scoring import score as scoring
from distributed_rerank.scoring.rounds import ScoredBlock, Scoring
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.storage import begun
from distributed_rerank.storage.artifacts import RESULT_VERSIONS, read_manifest
from distributed_rerank.training import run as training_run
from distributed_rerank.training.stage import train
from distributed_rerank.training.task import TrainingTask
from tests.small_catalogue import EXTRACTOR, concat_model, distance_model, make_catalogue, make_lists
from tests.training_examples import BACKBONE, SMALL, TOKENS, draw_catalogue

WORK = WorkConfig(images_per_block=3, images_per_batch=2, queries_per_block=4)
TOLERANT = replace(WORK, max_rejects=0.2)
CANDIDATES = FirstStageConfig(extractor=EXTRACTOR, n_items=4)
MEASURE = MeasureConfig(baselines=False)
TRAINING = replace(SMALL, epochs=1)
CHAIN = Chain((PairwiseStep(top_n=3, rule="replace"),))
STAGES = ("embed", "retrieve", "score", "train", "evaluate", "rerank")


@dataclass(frozen=True)
class Finished:
    """A finished folder, and the call that made it: called again, it finds nothing to do."""

    folder: Path
    start: Callable[[], Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    root = tmp_path_factory.mktemp("finished")
    catalogue = make_catalogue(root / "photos", 12)
    drawn = draw_catalogue(root / "drawn", n_labels=6)
    lists, model = make_lists(catalogue, 5), distance_model()
    embeddings = embed(catalogue, EXTRACTOR, root / "embed", work=WORK)
    calls = {
        "embed": lambda out: embed(catalogue, EXTRACTOR, out, work=WORK),
        "retrieve": lambda out: retrieve(catalogue, embeddings, 4, out),
        "score": lambda out: score_candidates(catalogue, lists, model, 4, out, work=WORK),
        "train": lambda out: train(drawn, TOKENS, TRAINING, out),
        "evaluate": lambda out: evaluate(
            catalogue, CANDIDATES, out, model=model, chain=CHAIN, measure=MEASURE, work=WORK
        ),
        "rerank": lambda out: rerank(catalogue, CANDIDATES, out, model=model, chain=CHAIN, work=WORK),
    }
    found = {}
    for name in STAGES:
        call, folder = calls[name], root / name
        call(folder)
        found[name] = Finished(folder, lambda call=call, folder=folder: call(folder))
    return found


def _flip(path: Path, place: int) -> bytes:
    """Change a bit of the byte at `place`; returns what the file held."""
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[place] ^= 4
    path.write_bytes(bytes(changed))
    return whole


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("stage", STAGES)
def test_second_start_finds_a_flipped_byte_in_every_file_and_one_that_is_gone(
    finished: dict[str, Finished], stage: str
) -> None:
    folder, start = finished[stage].folder, finished[stage].start
    start()
    paths, generator = _files(folder), np.random.default_rng(0)
    assert len(paths) >= 2
    for path in paths:
        size = path.stat().st_size
        for place in {0, size // 2, size - 1, int(generator.integers(size))} if size else ():
            whole = _flip(path, place)
            with pytest.raises(BadInput, match=re.escape(str(path))) as refused:
                start()
            assert "\n" not in str(refused.value)
            path.write_bytes(whole)
        aside = path.rename(path.with_name(f"{path.name} aside"))
        with pytest.raises(BadInput, match=path.name):
            start()
        aside.rename(path)
    start()
    assert _files(folder) == paths


READERS: dict[str, tuple[str, str, Callable[[Path, Any], Any]]] = {
    "embeddings": ("embed", "embeddings.parquet", lambda folder, _: read_embeddings(folder)),
    "embeddings file": (
        "embed",
        "embeddings.parquet",
        lambda folder, _: read_embeddings(folder / "embeddings.parquet"),
    ),
    "rejects": ("embed", "rejects.parquet", lambda folder, _: read_embeddings(folder)),
    "candidates": ("retrieve", "candidates.parquet", read_candidates),
    "candidates file": ("retrieve", "candidates.parquet", lambda f, c: read_candidates(f / "candidates.parquet", c)),
    "logits": ("score", "pair_distances.parquet", lambda folder, _: tables.read_table(folder, "pair_distances")),
    "per query": ("evaluate", "per_query.parquet", lambda folder, _: tables.read_table(folder, "per_query")),
    "nested candidates": (
        "evaluate",
        "candidates/candidates.parquet",
        lambda f, c: read_candidates(f / "candidates", c),
    ),
    "config": ("train", "config.json", lambda folder, _: load_model(folder)),
    "weights": ("train", "model.safetensors", lambda folder, _: load_model(folder)),
    "chain": ("train", "chain.json", lambda folder, _: read_chain(folder)),
    "model with chain": (
        "train",
        "chain.json",
        lambda folder, _: load_model_and_chain(RerankerConfig(model=str(folder))),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_a_damaged_or_missing_file_of_a_finished_folder_is_refused_by_name(
    finished: dict[str, Finished], reader: str
) -> None:
    stage, name, read = READERS[reader]
    folder = finished[stage].folder
    catalogue = make_catalogue(folder.parent / "photos", 12)
    path = folder / name
    read(folder, catalogue)
    whole = _flip(path, path.stat().st_size // 2)
    with pytest.raises(BadInput, match=f"{path} has changed since it was written .*--overwrite"):
        read(folder, catalogue)
    path.unlink()
    with pytest.raises(BadInput, match=f"{path} is gone from a finished folder"):
        read(folder, catalogue)
    path.write_bytes(whole)
    read(folder, catalogue)


def test_model_folder_without_a_manifest_is_taken_as_it_is(finished: dict[str, Finished], tmp_path: Path) -> None:
    """As it comes from the hub, where the manifest is not sent."""
    shutil.copytree(finished["train"].folder, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    (tmp_path / "model" / "chain.json").unlink()
    assert load_model(tmp_path / "model") is not None


@pytest.mark.parametrize("stage", STAGES)
def test_manifest_tells_device_precision_and_versions_and_results_do_not(
    finished: dict[str, Finished], stage: str
) -> None:
    folder = finished[stage].folder
    manifest = read_manifest(folder)
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert manifest["fingerprint"]["result_version"][stage] == RESULT_VERSIONS[stage]
    assert "code_version" not in str(manifest)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert manifest["computed_with"]["device"] == kind
    if stage in ("embed", "score", "train"):
        assert manifest["computed_with"]["precision"] == "float32"
    if stage in ("evaluate", "rerank"):
        parts = manifest["stages"]
        assert parts["embeddings"]["precision"] == parts["pair_distances"]["precision"] == "float32"
        assert parts["candidates"]["device"] == kind
    for path in folder.glob("*.json"):
        assert path.name == "manifest.json" or "computed_with" not in path.read_text()
    assert not [path for path in _files(folder) if path.name == begun.BEGUN]


def _stop_after(n_blocks: int, computed: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def stops(*arguments: Any) -> Iterator[Any]:
        for done, result in enumerate(computed(*arguments)):
            if done == n_blocks:
                raise KeyboardInterrupt
            yield result

    return stops


def test_embedding_begun_in_bfloat16_is_not_continued_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """found.md A12: precision "auto" on a node with native bfloat16 and then on one without it."""
    catalogue = make_catalogue(tmp_path / "photos", 9)
    config = replace(EXTRACTOR, precision="auto")
    with monkeypatch.context() as other_node:
        other_node.setattr(precision, "bf16_support", lambda device: "AVX-512 BF16")
        with pytest.raises(KeyboardInterrupt):
            embed(
                catalogue,
                config,
                tmp_path / "out",
                work=WORK,
                executors=SimpleNamespace(embed_blocks=_stop_after(1, extraction.embed_blocks)),
            )
        embed(catalogue, config, tmp_path / "finished", work=WORK)
    monkeypatch.setattr(precision, "bf16_support", lambda device: None)
    words = r"begun with precision=bfloat16 on \w+, a worker of this run computes with precision=float32 on \w+"
    with pytest.raises(BadInput, match=words) as refused:
        embed(catalogue, config, tmp_path / "out", work=WORK)
    assert not (tmp_path / "out").exists()
    (begun_folder,) = tmp_path.glob(".out.????????????????")
    assert f"delete {begun_folder}" in str(refused.value)
    shutil.rmtree(begun_folder)
    embed(catalogue, config, tmp_path / "out", work=WORK)
    assert read_manifest(tmp_path / "out")["computed_with"]["precision"] == "float32"
    # a finished folder stays what it is, wherever it is read, but nothing is added to it elsewhere
    embed(catalogue, config, tmp_path / "finished", work=WORK)
    assert read_manifest(tmp_path / "finished")["computed_with"]["precision"] == "bfloat16"
    grown = make_catalogue(tmp_path / "photos", 12)
    with pytest.raises(BadInput, match=r"finished was made with precision=bfloat16 on \w+.*pass --overwrite"):
        embed(grown, config, tmp_path / "finished", work=WORK)
    assert len(embed(grown, config, tmp_path / "finished", work=WORK, overwrite=True).ids) == 12


def test_scoring_on_workers_of_two_kinds_is_refused_before_a_block_is_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 9)
    model, lists = concat_model(), make_lists(catalogue, 4)
    model.extractor.config = replace(EXTRACTOR, precision="auto")

    def by_two_workers(run: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        for support, part in ((None, run.numbers[:1]), ("AVX-512 BF16", run.numbers[1:])):
            with monkeypatch.context() as worker:
                worker.setattr(precision, "bf16_support", lambda device, support=support: support)
                yield from scoring.score_blocks(replace(run, numbers=part))

    with pytest.raises(BadInput, match=r"begun with precision=float32 on \w+, a worker .*precision=bfloat16 on \w+"):
        score_candidates(
            catalogue,
            lists,
            model,
            4,
            tmp_path / "out",
            work=WORK,
            executors=SimpleNamespace(score_blocks=by_two_workers),
        )
    assert len(list(tmp_path.glob(".out.*/blocks/pair_distances/block-*.parquet"))) == 1


def test_training_begun_in_bfloat16_is_not_continued_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = draw_catalogue(tmp_path / "drawn", n_labels=6)
    tokens = replace(TOKENS, extractor=replace(BACKBONE, precision="auto"))

    def stops(task: TrainingTask, folder: Path) -> Any:
        training_run.fit(task, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as other_node:
        other_node.setattr(precision, "bf16_support", lambda device: "AVX-512 BF16")
        with pytest.raises(KeyboardInterrupt):
            train(catalogue, tokens, TRAINING, tmp_path / "out", fit=stops)
    monkeypatch.setattr(precision, "bf16_support", lambda device: None)
    with pytest.raises(BadInput, match=r"precision=auto \(bfloat16\) on \w+, .*precision=auto \(float32\) on \w+"):
        train(catalogue, tokens, TRAINING, tmp_path / "out")
    monkeypatch.setattr(precision, "bf16_support", lambda device: "AVX-512 BF16")
    train(catalogue, tokens, TRAINING, tmp_path / "out")
    assert read_manifest(tmp_path / "out")["computed_with"] == {
        "device": pick_device().type, "precision": "bfloat16", "auto_precision": "bfloat16",
    }  # fmt: skip


def _damage_a_block(root: Path, pattern: str, number: int) -> None:
    (path,) = root.glob(f"{pattern}/block-{number:08d}.*.parquet")
    _flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("store", ["embeddings", "rejects"])
def test_embed_with_a_damaged_block_gives_the_bytes_of_an_undisturbed_run(tmp_path: Path, store: str) -> None:
    catalogue = make_catalogue(tmp_path / "photos", 11, broken=(4,))
    embed(catalogue, EXTRACTOR, tmp_path / "whole", work=TOLERANT)
    with pytest.raises(KeyboardInterrupt):
        embed(
            catalogue,
            EXTRACTOR,
            tmp_path / "out",
            work=TOLERANT,
            executors=SimpleNamespace(embed_blocks=_stop_after(3, extraction.embed_blocks)),
        )
    _damage_a_block(tmp_path, f".out.*/blocks/{store}", 1)
    asked: list[str] = []

    def spy(
        blocks: Sequence[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        asked.extend(ref.id for _, refs in blocks for ref in refs)
        yield from extraction.embed_blocks(blocks, config, work)

    embed(catalogue, EXTRACTOR, tmp_path / "out", work=TOLERANT, executors=SimpleNamespace(embed_blocks=spy))
    assert asked == [f"picture_{number:03d}.png" for number in (3, 4, 5, 9, 10)]
    for name in ("embeddings.parquet", "rejects.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("store", ["pair_distances", "rejects"])
def test_evaluation_killed_with_a_damaged_block_and_stage_gives_the_same_results(tmp_path: Path, store: str) -> None:
    catalogue, model = make_catalogue(tmp_path / "photos", 12), distance_model()
    settings: dict[str, Any] = {"model": model, "chain": CHAIN, "measure": MEASURE, "work": WORK}
    evaluate(catalogue, CANDIDATES, tmp_path / "whole", **settings)
    executors = SimpleNamespace(
        embed_blocks=extraction.embed_blocks,
        search_blocks=retrieval.search_blocks,
        score_blocks=_stop_after(2, scoring.score_blocks),
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate(catalogue, CANDIDATES, tmp_path / "out", **settings, executors=executors)
    _damage_a_block(tmp_path, f".out.*/.pair_distances.*/blocks/{store}", 0)
    (embeddings,) = tmp_path.glob(".out.*/embeddings/embeddings.parquet")
    _flip(embeddings, 200)
    evaluate(catalogue, CANDIDATES, tmp_path / "out", **settings)
    for name in ("metrics.json", "per_query.parquet", "reranked.parquet", "embeddings/embeddings.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # of the two blocks in each of two tables, block 0 was written anew in both
    assert read_manifest(tmp_path / "out" / "pair_distances")["blocks"]["reused"] == 2
    assert not list((tmp_path / "out").rglob("*damaged*"))
