"""The points of scale.py: each is one piece of work of a given size, in a process of its own, for its time and memory.

python _points.py score '{"n_queries": 32, "n_images": 160, "top_n": 10}'
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import distributed_rerank  # noqa: F401  (first, as in a job: it chooses Arrow's allocator)

# isort: split
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from _measuring import PeakMemory
from _planted import planted_logits, write_planted
from _reading import memory_mb, reading, staged, table_mb
from PIL import Image

from distributed_rerank import retrieval
from distributed_rerank.chain.chain import Chain, PairwiseStep
from distributed_rerank.cluster.executors import RayExecutors
from distributed_rerank.cluster.session import connect
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.config.evaluation import FirstStageConfig, MeasureConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.candidate_files import read_candidates
from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.decoding import decode
from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.data.tables import embeddings_table
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.data.vectors import write_vectors
from distributed_rerank.evaluation import measure as evaluation
from distributed_rerank.evaluation.run import evaluate
from distributed_rerank.executors import Executors
from distributed_rerank.extraction import EmbeddedBlock, ImageBlock, embed
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.reranking.lists import LazyRanking
from distributed_rerank.reranking.rankings import CURVE, rankings
from distributed_rerank.retrieval import SearchSide
from distributed_rerank.runtime.devices import InferenceThreads
from distributed_rerank.scoring import plan as scoring_plan
from distributed_rerank.scoring.rounds import ScoredBlock, Scoring
from distributed_rerank.scoring.scored_lists import ScoredLists
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.storage.artifacts import read_manifest
from distributed_rerank.storage.begun import ComputedWith
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists, concatenate
from distributed_rerank.training.mining import mining_figures
from distributed_rerank.training.task import TrainingRun, TrainingTask, plan_epoch

Answer = dict[str, float]


def write_photos(folder: Path, n_images: int, n_queries: int) -> Catalogue:
    """A catalogue of JPEG photos of 400 x 300, eight of a label; the first `n_queries` are queries."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(n_images):
        path = f"images/{number:06d}.jpg"
        grid = Image.fromarray(rng.integers(256, size=(8, 10, 3), dtype=np.uint8))
        grid.resize((400, 300), Image.Resampling.BICUBIC).save(folder / path, quality=90)
        label, is_query = number % max(2, n_images // 8), number < n_queries
        rows.append({"label": label, "path": path, "split": "validation", "is_query": is_query, "is_gallery": True})
    pd.DataFrame(rows).to_csv(folder / "df.csv", index=False)
    return read_catalogue(str(folder / "df.csv"), purpose="evaluation")


def bucket(folder: Path, n_images: int = 1024, latency_s: float = 0.05, size: int = 224) -> Answer:
    """Images a second read from a bucket that answers late and decoded, by two processes with a block of 256 each."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    s3 = importlib.import_module("s3_server")
    catalogue = write_photos(folder, n_images, 1)
    with s3.started() as server, ProcessPoolExecutor(2, get_context("spawn")) as workers:
        os.environ.update(s3.ENVIRONMENT, AWS_ENDPOINT_URL=server.address)
        server.make_bucket("slow")
        s3.put_folder(folder, f"{server.bucket}/photos")
        refs = [
            ImageRef(ref.id, f"{server.bucket}/photos/images/{Path(ref.path).name}", None) for ref in catalogue.images()
        ]
        decode_block = partial(decode, transform=InferenceTransform(size=(size, size)))
        list(workers.map(decode_block, [refs[:2]] * 4))  # the imports
        server.requests()
        server.faults(latency_s=latency_s)
        blocks = [refs[start : start + 256] for start in range(0, n_images, 256)]
        began = time.perf_counter()
        kept = sum(len(block.kept) for block in workers.map(decode_block, blocks))
        seconds = time.perf_counter() - began
        assert kept == n_images, f"{n_images - kept} images were not read"
        return {"seconds": seconds, "images_per_s": n_images / seconds, "requests": len(server.requests())}


def random_lists(catalogue: Catalogue, n_queries: int, top_n: int) -> CandidateLists:
    """`top_n` random candidates for each of `n_queries` queries, never the query itself; an image may be several
    queries' candidate."""
    rng = np.random.default_rng(1)
    items = np.stack([rng.permutation(len(catalogue) - 1)[:top_n] for _ in range(n_queries)])
    queries = np.arange(n_queries)
    items += items >= queries[:, None]
    distances = np.sort(rng.random(items.shape, dtype=np.float32), axis=1)
    return CandidateLists.from_arrays(queries, items.astype(np.int64), distances)


def make_model(name: str, size: int) -> ConcatSiamese:
    """An untrained ConcatSiamese: its pairs dominate all else, and its encodings are the images themselves."""
    return ConcatSiamese(ConcatSiameseConfig(extractor=ExtractorConfig(name=name, weights="none", image_size=size)))


def score(
    folder: Path, n_queries: int, n_images: int, top_n: int, name: str, size: int,
    workers: int = 0, encoding_gb: float = 2.0, is_measured: bool = False, queries_per_block: int | None = None,
    blocks_per_call: int | None = None,
) -> Answer:  # fmt: skip
    """The scoring stage, from image files to its folder; with `is_measured` also the metrics for every n."""
    catalogue = write_photos(folder, n_images, n_queries)
    lists, model = random_lists(catalogue, n_queries, top_n), make_model(name, size)
    work = WorkConfig(
        encoding_gb=encoding_gb,
        queries_per_block=queries_per_block,
        blocks_per_call=blocks_per_call,
    )
    session = connect(ClusterConfig(num_workers=workers, use_gpu=False)) if workers else nullcontext()
    with PeakMemory() as memory, session as connected:
        executors = None if connected is None else RayExecutors(lambda: connected)
        started = time.perf_counter()
        scored = score_candidates(catalogue, lists, model, top_n, folder / "out", work=work, executors=executors)
        seconds = time.perf_counter() - started
    manifest = read_manifest(folder / "out")
    answer = {
        "seconds": seconds,
        "seconds_of_pairs": manifest["seconds"]["score"],
        "pairs": scored.n_pairs,
        "unique": scored.n_images,
        "tree_mb": memory.peak_mb,
    }
    if is_measured:
        answer |= time_metrics(catalogue, scored, top_n)
    return answer | manifest["counts"]


def time_metrics(catalogue: Catalogue, scored: ScoredLists, top_n: int) -> Answer:
    """Seconds of ranking and measuring for the largest n alone, and for every n."""
    queries = scored.lists.query_items
    chain = Chain((PairwiseStep(top_n=top_n, rule="replace"),))
    found = {}
    for name, curve in (("largest_s", ()), ("every_s", CURVE)):
        started = time.perf_counter()
        found_by = rankings(chain, scored, catalogue, None, queries, curve)
        evaluation.measure(catalogue, queries, LazyRanking(queries, scored.lists.of_queries), found_by)
        found[name] = time.perf_counter() - started
    return found


def bare_loop(folder: Path, n_queries: int, n_images: int, top_n: int, name: str, size: int, threads: int) -> Answer:
    """What Ray is held against: the same blocks and micro-batches in a plain loop, nothing written, nothing sent."""
    catalogue = write_photos(folder, n_images, n_queries)
    lists, model = random_lists(catalogue, n_queries, top_n), make_model(name, size)
    gflop = model.gflop_per_pair()
    plan = scoring_plan.make_plan(
        lists,
        top_n=top_n,
        queries_per_block=scoring_plan.queries_per_block(top_n, gflop),
        images_per_batch=16,
        tapers=True,
    )
    batch = scoring_plan.pairs_per_batch(gflop, is_gpu=False)
    lanes, done = InferenceThreads(threads), 0
    model.prepare_for_inference("cpu")
    started = time.perf_counter()
    images = decode(catalogue.images(plan.items), model.transform, threads=threads).pixels
    row_of = torch.empty(len(catalogue), dtype=torch.int64)
    row_of[torch.from_numpy(plan.items)] = torch.arange(len(plan.items))
    for block in plan.blocks:
        queries = block.lists.query_items.repeat_interleave(top_n)
        pairs = (row_of[queries], row_of[block.lists.items.flatten()], block.lists.distances.flatten())
        parts = zip(*(values.split(batch) for values in pairs), strict=True)
        done += sum(lanes.map(lambda part: len(model(images[part[0]], images[part[1]], part[2])), parts))
    return {"seconds": time.perf_counter() - started, "pairs": done}


def search(folder: Path, n_queries: int, n_gallery: int, dim: int, n_items: int, is_one_set: bool = False) -> Answer:
    """Exact search in one process with one thread; with `is_one_set` the queries are gallery items."""
    generator = torch.Generator().manual_seed(0)

    def side(n: int, first: int) -> SearchSide:
        embeddings = torch.empty(n, dim)
        for start, stop in sharding.blocks(n, 65_536):  # normalised in parts: the whole would need twice the memory
            part = torch.randn(stop - start, dim, generator=generator)
            embeddings[start:stop] = torch.nn.functional.normalize(part, dim=1)
        return SearchSide(embeddings.numpy(), np.arange(first, first + n), np.full(n, -1))

    gallery = side(n_gallery, 0)
    queries = gallery.part(0, n_queries) if is_one_set else side(n_queries, n_gallery)
    work = WorkConfig()
    blocks = list(enumerate(sharding.blocks(n_queries, work.queries_per_search_block)))
    started = time.perf_counter()
    results = retrieval.search_blocks(blocks, queries, gallery, n_items, work)
    found = sum(len(block.lists.query_items) for _, block in results)
    return {"seconds": time.perf_counter() - started, "queries": found}


def search_clustered(
    folder: Path, n_queries: int, n_gallery: int, dim: int, n_items: int = 100, recall: float | None = None
) -> Answer:
    """The stage that searches, of embeddings in a file that lie in 24 directions around a centre for each 100 of them.

    In one process with one thread, its CPU seconds; approximate where a `recall` is asked for.
    """
    rng = np.random.default_rng(0)
    n, directions = n_gallery + n_queries, rng.standard_normal((24, dim), np.float32)
    centres = rng.standard_normal((n_gallery // 100, 24), np.float32)
    ids = np.array([f"{number:09d}" for number in range(n)])
    roles = {"is_query": np.arange(n) >= n_gallery, "is_gallery": np.arange(n) < n_gallery}
    catalogue = Catalogue(pd.DataFrame({"id": ids, "path": ids, "split": "validation", **roles}), "generated")

    def parts() -> Iterator[pa.Table]:
        for start, stop in sharding.blocks(n, 16_384):
            near = centres[rng.integers(len(centres), size=stop - start)]
            near = (near + 0.5 * rng.standard_normal(near.shape, np.float32)) @ directions
            near += 0.5 * rng.standard_normal(near.shape, np.float32)
            yield embeddings_table(ids[start:stop], near / np.linalg.norm(near, axis=1, keepdims=True))

    write_vectors(folder / "embeddings.parquet", dim, parts())
    embeddings = read_embeddings(folder / "embeddings.parquet")
    assert catalogue.digest(), "digests take as long for every search"
    assert embeddings.digest
    started = time.process_time()
    retrieval.retrieve(catalogue, embeddings, n_items, folder / "out", recall=recall)
    found = read_manifest(folder / "out").get("search", {})
    return {"seconds": time.process_time() - started, "queries": n_queries, **found}


def mine(
    folder: Path, n_images: int, dim: int, n_items: int, n_labels: int, threads: int = 1, workers: int = 0
) -> Answer:
    """Mining over a training set: every image's nearest, the filters' figures, and the lists of one epoch.

    In one process with so many threads, or on so many Ray workers of one thread.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n_images) % n_labels
    embeddings = torch.randn(n_labels, dim, generator=generator)[labels]
    embeddings = torch.nn.functional.normalize(embeddings + torch.randn(n_images, dim, generator=generator), dim=1)
    side = SearchSide(embeddings.numpy(), np.arange(n_images), np.full(n_images, -1))
    training = TrainingConfig(n_items=n_items, top_n=n_items, steps_per_epoch=None)
    work = WorkConfig(threads_per_worker=threads)
    blocks = list(enumerate(sharding.blocks(n_images, work.queries_per_search_block)))
    session = connect(ClusterConfig(num_workers=workers, use_gpu=False)) if workers else nullcontext()
    with PeakMemory() as memory, session as connected:
        search = retrieval.search_blocks if connected is None else RayExecutors(lambda: connected).search_blocks
        started = time.perf_counter()
        found = dict(search(blocks, side, side, n_items, work))
        lists = concatenate([found.pop(number).lists for number, _ in blocks])
        searched = time.perf_counter() - started
        task = TrainingTask(
            catalogue=labelled(labels.numpy()), config=training, model_folder=folder, embeddings=embeddings,
            runs=(TrainingRun("all", lists, None),),
        )  # fmt: skip
        figures, steps = mining_figures(task), plan_epoch(task, task.runs[0], 0)
        seconds = time.perf_counter() - started
    answer = {"seconds": seconds, "search_s": searched, "images": n_images, "tree_mb": memory.peak_mb}
    return answer | {"lists": sum(step.n_lists() for step in steps), "positives": figures["n_positives"]}


def driver_memory(folder: Path, n_images: int, n_queries: int = 1000, dim: int = 384, top_n: int = 50) -> Answer:
    """The driver's peak memory in MB and seconds of each stage, from a table to the report; embeddings are made up.

    Every image is in the gallery. Workers' part of `embed` is replaced by noise around a centre of each label; all else
    is the real job, in one process. `held_mb` is what the process holds once it has read the catalogue, `table_mb` the
    table's own bytes.
    """
    answer: Answer = {}
    with staged(answer, "catalogue"):
        catalogue = read_catalogue(str(write_made_up(folder, n_images, n_queries)), purpose="evaluation")
        catalogue = catalogue.restrict("validation")
        held = [catalogue.labels, catalogue.sequences, catalogue.query_items]
        assert all(len(column) for column in held), "its columns as numbers belong to the catalogue"
    answer["held_mb"] = memory_mb("VmRSS")
    answer["table_mb"] = table_mb(catalogue.table)
    with staged(answer, "embed"):
        embed(
            catalogue,
            ExtractorConfig(name="resnet10t", weights="none", image_size=32),
            folder / "embeddings",
            executors=MadeUp(dim),
        )
    first = FirstStageConfig(embeddings=folder / "embeddings")
    with staged(answer, "evaluate"):
        evaluate(catalogue, first, folder / "out", measure=MeasureConfig(baselines=False))
    with staged(answer, "score_plan"):
        lists = read_candidates(folder / "out" / "candidates", catalogue)
        plan = scoring_plan.make_plan(lists, top_n=top_n, queries_per_block=16, images_per_batch=16, tapers=True)
    seconds = sum(value for name, value in answer.items() if name.endswith("_s"))
    return answer | {"seconds": seconds, "images": n_images, "blocks": len(plan.blocks)}


@dataclass(frozen=True)
class MadeUp:
    """In place of workers that embed: unit vectors near one of their label, a block at a time."""

    dim: int

    def embed_blocks(
        self, blocks: Sequence[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        """The vectors of these blocks."""
        for number, images in blocks:
            ids = [ref.id for ref in images]
            rng = np.random.default_rng(number)
            centres = np.repeat(rng.standard_normal((len(ids) // 8 + 1, self.dim), np.float32), 8, axis=0)[: len(ids)]
            vectors = centres + rng.standard_normal(centres.shape, np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            yield number, EmbeddedBlock(ids, vectors, [], ComputedWith("cpu"))


def write_made_up(folder: Path, n_images: int, n_queries: int) -> Path:
    """The table of images that nobody opens, eight of a label."""
    with open(folder / "df.csv", "w", encoding="utf-8") as file:
        file.write("path,label,split,is_query,is_gallery\n")
        every = n_images // n_queries
        for number in range(n_images):
            file.write(f"images/{number:08d}.jpg,{number // 8},validation,{int(number % every == 0)},1\n")
    return folder / "df.csv"


def labelled(labels: np.ndarray) -> Catalogue:
    """A catalogue of images that nobody opens."""
    ids = [f"{number:08d}" for number in range(len(labels))]
    table = pd.DataFrame({"id": ids, "path": ids, "label": labels.astype(str), "split": "train"})
    return Catalogue(table, "generated")


def evaluate_lists(folder: Path, n_queries: int, depth: int) -> Answer:
    """The evaluation of planted lists in a file, from the catalogue's table to the report, without baselines."""
    table, candidates = write_planted(folder, n_queries, depth)
    started = time.perf_counter()
    catalogue = read_catalogue(str(table), purpose="evaluation").restrict("validation")
    measure = MeasureConfig(baselines=False)
    evaluate(catalogue, FirstStageConfig(candidates=candidates), folder / "out", measure=measure)
    return {"seconds": time.perf_counter() - started, "queries": n_queries}


def evaluate_logits(folder: Path, n_queries: int, depth: int) -> Answer:
    """The evaluation of planted lists in a file with a model, from the catalogue's table to the report, no baselines.

    The workers' part of scoring is replaced by planted logits; all else is the real job, in one process: the plan, the
    scored blocks and their table, re-ranking for every top_n of the curve, the metrics, the re-ranked lists.
    """
    table, candidates = write_planted(folder, n_queries, depth)
    started = time.perf_counter()
    catalogue = read_catalogue(str(table), purpose="evaluation").restrict("validation")
    found = evaluate(
        catalogue,
        FirstStageConfig(candidates=candidates),
        folder / "out",
        model=make_model("test_resnet", 32),
        chain=Chain((PairwiseStep(top_n=depth, rule="replace"),)),
        measure=MeasureConfig(baselines=False),
        work=WorkConfig(queries_per_block=1000),
        executors=cast(Executors, MadeUpLogits()),
    )
    gain = found["difference"]["map@10"]
    assert gain["ci95"][0] > 0, f"the planted gain was not found: {gain}"
    seconds = json.loads((folder / "out" / "timings.json").read_text())["seconds"]
    named = {f"{name}_s": seconds[name] for name in ("retrieve", "score", "rank", "measure", "report")}
    return named | {"seconds": time.perf_counter() - started, "queries": n_queries}


@dataclass(frozen=True)
class MadeUpLogits:
    """In place of workers that score: planted logits, a block at a time."""

    def score_blocks(self, scoring: Scoring) -> Iterator[tuple[int, ScoredBlock]]:
        """The logits of the run's blocks."""
        for number in scoring.numbers:
            lists = scoring.plan.blocks[number].lists
            logits = planted_logits(lists).masked_fill(lists.items < 0, torch.nan)
            yield number, ScoredBlock(logits, [], frozenset({ComputedWith("cpu")}))


POINTS = {
    "bucket": bucket,
    "driver_memory": driver_memory,
    "reading": reading,
    "score": score,
    "bare_loop": bare_loop,
    "search": search,
    "search_clustered": search_clustered,
    "mine": mine,
    "evaluate_lists": evaluate_lists,
    "evaluate_logits": evaluate_logits,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(POINTS[sys.argv[1]](Path(work), **json.loads(sys.argv[2]))))
