"""Parts of gpu.py that go through Ray: a worker that holds the GPU, or on a machine without one a worker on the CPU.

Each starts a Ray of its own and ends it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import _gpu_project as project
from _gpu_measure import Busy, Context, Wanted

SCORE_WANTED: Wanted = ("at least", 8_000.0)
BUSY_WANTED: Wanted = ("at least", 85.0)


@contextmanager
def session_of(context: Context) -> Iterator[Any]:
    """A Ray of one worker, started here."""
    from distributed_rerank.cluster.session import connect
    from distributed_rerank.config.cluster import ClusterConfig

    store = 0.3 if context.is_quick else 8.0
    started = time.perf_counter()
    with connect(ClusterConfig(num_workers=1, use_gpu=context.is_gpu, object_store_gb=store)) as session:
        context.row("start of Ray", "s", time.perf_counter() - started)
        context.row("worker", "", "one GPU" if session.use_gpu else "CPU")
        yield session


def ray_embed(context: Context) -> None:
    """Ray Data: JPEG files decoded by many tasks, embedded by one actor."""
    from distributed_rerank import extraction
    from distributed_rerank.cluster.executors import RayExecutors
    from distributed_rerank.config.work import WorkConfig

    size = project.sizes(context.is_quick)
    refs = project.photo_catalogue(context.work, size).images()
    config, work = project.extractor_config("vit", size), WorkConfig(images_per_block=16 if context.is_quick else 256)
    blocks = extraction.plan(refs, work.images_per_block)
    with session_of(context) as session, Busy(context) as busy:
        started = time.perf_counter()
        embedded = RayExecutors(lambda: session).embed_blocks(blocks, config, work)
        came = [(time.perf_counter(), len(block.ids)) for _, block in embedded]
        context.row("embedding by Ray Data, start of its actors included", "images/s", rate_since(started, came))
        # From the first block to the last: the actors are up.
        steady = rate_since(came[0][0], came[1:])
        context.row("embedding by Ray Data, once it runs", "images/s", steady)
        n = sum(count for _, count in came)
        assert n == len(refs), f"{n} of {len(refs)} images were embedded"
    busy.report("embedding by Ray Data, start included")


def rate_since(started: float, came: list[tuple[float, int]]) -> float:
    """Units per second of what came, with its times, since `started`."""
    return sum(count for _, count in came) / max(came[-1][0] - started, 1e-9)


def ray_score(context: Context) -> None:
    """Scoring actors: the whole stage from JPEG files to its folder, with concat and with token."""
    from distributed_rerank.cluster.executors import RayExecutors
    from distributed_rerank.config.work import WorkConfig
    from distributed_rerank.scoring.stage import score_candidates
    from distributed_rerank.storage.artifacts import read_manifest

    size = project.sizes(context.is_quick)
    catalogue, lists = project.photo_catalogue(context.work, size), project.random_lists(size)
    work = WorkConfig(decode_threads=project.CORES)
    with session_of(context) as session:
        for name, wanted in (("concat", SCORE_WANTED), ("token", None)):
            with context.attempt(f"scoring actors, {name}"):
                model = project.build_pairwise(name, size)
                folder = context.work / f"ray-{name}"
                started = time.perf_counter()
                came: list[float] = []
                with Busy(context) as busy:
                    executors = RayExecutors(lambda: session)
                    noting: Any = SimpleNamespace(score_blocks=noting_times(executors.score_blocks, came))
                    scored = score_candidates(catalogue, lists, model, size.top_n, folder, work=work, executors=noting)
                seconds = time.perf_counter() - started
                spent = read_manifest(folder)["seconds"]
                n_pairs = lists.items.numel()
                assert scored.n_pairs == n_pairs, f"{scored.n_pairs} of {n_pairs} pairs were scored"
                context.row(f"{name} on Ray, from decoded images", "pairs/s", scored.n_pairs / spent["score"], wanted)
                context.row(f"{name} on Ray, images read and encoded", "images/s", scored.n_images / spent["encode"])
                context.row(f"{name} on Ray, everything from start to folder", "pairs/s", scored.n_pairs / seconds)
                name = f"{name} on Ray, from the first scored block to the last"
                busy.report(name, BUSY_WANTED if wanted else None, since=came[0], until=came[-1])


def noting_times(score: Callable[..., Iterator[Any]], came: list[float]) -> Callable[..., Iterator[Any]]:
    """The step `score`, which adds the time of every block that it yields to `came`."""

    def step(*given: Any) -> Iterator[Any]:
        for block in score(*given):
            came.append(time.perf_counter())
            yield block

    return step


def ray_train(context: Context) -> None:
    """Ray Train: one worker, gradients summed by NCCL (gloo on a CPU), all weights of ConcatSiamese."""
    from distributed_rerank.cluster.training import fit

    size = project.sizes(context.is_quick)
    catalogue = project.photo_catalogue(context.work, size)
    n, n_steps, epochs = (16, 2, 2) if context.is_quick else (512, 12, 3)
    task = project.training_task(
        catalogue, project.build_pairwise("concat", size), context.work / "ray-train-model", n, epochs=epochs,
        lists_per_step=size.train_lists[-1], steps_per_epoch=n_steps, loader_workers=project.CORES,
    )  # fmt: skip
    n_pairs = [sum(map(len, project.steps_of(task, epoch))) for epoch in range(epochs)]
    with session_of(context) as session, Busy(context) as busy:
        started = time.perf_counter()
        state = fit(task, context.work / "ray-train", session=session)
        context.row("Ray Train, the whole run", "s", time.perf_counter() - started)
    history = state["current"]["history"]
    context.row("Ray Train, sums by", "", "NCCL" if session.use_gpu else "gloo")
    context.row("Ray Train, losses of the epochs", "", ", ".join(f"{entry['loss']:.4f}" for entry in history))
    context.row("Ray Train, last epoch, from JPEG files", "pairs/s", n_pairs[-1] / history[-1]["seconds"])
    busy.report("Ray Train, start included")
