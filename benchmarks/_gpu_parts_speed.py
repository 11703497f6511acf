"""Parts of gpu.py that measure the models and the search in one process."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import _gpu_project as project
import numpy as np
import torch
from _gpu_measure import (
    Busy,
    Context,
    Wanted,
    forms_of,
    matmul_peak,
    rate,
    relative_error,
    synchronise,
    top_kernels,
)

CONCAT_WANTED: Wanted = ("at least", 12_000.0)
TOKEN_WANTED: Wanted = ("at least", 300_000.0)
EMBED_WANTED: Wanted = ("at least", 6_000.0)
SEARCH_WANTED: Wanted = ("at most", 2.0)
BUSY_WANTED: Wanted = ("at least", 85.0)

COMPILED = ("torch.compile", "torch.compile and CUDA graph")
"""The forms that take half a minute to make."""


class Pairs:
    """A prepared pairwise model with encodings on the device, and the ways to measure it."""

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.context = context
        self.model = project.build_pairwise(name, project.sizes(context.is_quick))
        self.gflop = self.model.gflop_per_pair()
        self.model.prepare_for_inference(context.device)
        # More images than a GPU's cache holds.
        self.n_images = 32 if context.is_quick else 1024
        side = self.model.transform.size[0]
        with torch.inference_mode():
            parts = project.pixels_of(self.n_images, side).split(128)
            self.encoded = torch.cat([self.model.encode(part.to(context.device)) for part in parts])

    def inputs(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The encodings and distances of `n` random pairs."""
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(self.n_images, (2, n), generator=generator).to(self.context.device)
        distances = torch.rand(n, generator=generator).to(self.context.device)
        return self.encoded[places[0]], self.encoded[places[1]], distances

    def measure(self, forward: Callable[..., Any], n: int, form: str, peak: float) -> float:
        """Pairs per second of `forward` on micro-batches of `n` gathered from the encodings."""
        generator = torch.Generator().manual_seed(1)
        places = torch.randint(self.n_images, (4, 2, n), generator=generator).to(self.context.device)
        distances = torch.rand(n, generator=generator).to(self.context.device)

        def some_pairs() -> int:
            for query, candidate in places.unbind(0):
                forward(self.encoded[query], self.encoded[candidate], distances)
            return 4 * n

        found = rate(some_pairs, self.context)
        self.context.row(f"{self.name}, {form}, micro-batches of {n:,}", "pairs/s", found)
        share = 100 * found * self.gflop * 1e9 / peak
        self.context.row(f"{self.name}, {form}, micro-batches of {n:,}: of the matmul peak", "%", share)
        return found

    def eager(self, batches: Sequence[int], peak: float) -> int:
        """Measures the model as it is; returns the fastest micro-batch."""
        rates: dict[int, float] = {}
        for n in batches:
            with self.context.attempt(f"{self.name}, eager, micro-batches of {n:,}"), torch.inference_mode():
                rates[n] = self.measure(self.model, n, "eager", peak)
        return max(rates, key=rates.__getitem__) if rates else min(batches)

    def static(self, n: int, peak: float, left_out: Sequence[str] = ()) -> None:
        """Measures the forms with static shapes, each against the eager model's logits."""
        forms = forms_of(self.model, self.context.is_gpu)
        for form in [name for name in forms if name not in left_out]:
            with self.context.attempt(f"{self.name}, {form}"), torch.inference_mode():
                example = self.inputs(n)
                forward = forms[form](example)
                error = relative_error(forward(*example), self.model(*example))
                self.context.row(f"{self.name}, {form}: error against eager", "", error)
                self.measure(forward, n, form, peak)

    def through_scorer(self, wanted: Wanted | None) -> None:
        """Pairs per second of the project's Scorer, from encodings in this process's memory to logits there."""
        with self.context.attempt(f"{self.name}, through the scorer"):
            work = scorer_work(self.model, self.encoded, self.n_images, self.context)
            work()
            started = time.perf_counter()
            with Busy(self.context) as busy:
                found = rate(work, self.context, seconds=None if self.context.is_quick else 4.0)
            self.context.row(f"{self.name}, through the scorer, from cached encodings", "pairs/s", found, wanted)
            # NVML's share is of the last second.
            busy.report(f"{self.name}, through the scorer", BUSY_WANTED if wanted else None, since=started + 1.0)


def scorer_work(model: Any, encoded: torch.Tensor, n_images: int, context: Context) -> Callable[[], int]:
    """A call of the project's Scorer with as many blocks as it gets on Ray, each of its usual size."""
    from distributed_rerank.config.work import WorkConfig
    from distributed_rerank.runtime.devices import array_of
    from distributed_rerank.scoring import plan
    from distributed_rerank.scoring.rounds import PairTask
    from distributed_rerank.scoring.score import Scorer

    work = WorkConfig()
    scorer = Scorer(model, work)
    array, rng = array_of(encoded), np.random.default_rng(0)
    top_n = project.sizes(context.is_quick).top_n
    n_queries = min(plan.queries_per_block(top_n, model.gflop_per_pair()), 4 if context.is_quick else 10**6)

    def task() -> Any:
        # A query's candidates, as the plan makes them.
        queries = np.repeat(rng.integers(n_images, size=n_queries), top_n)
        candidates = rng.integers(n_images, size=n_queries * top_n)
        return PairTask(queries, candidates, np.ones(len(queries), np.float32))

    tasks = [task() for _ in range(work.score_blocks_per_call(context.is_gpu))]
    return lambda: sum(map(len, scorer.score(tasks, np.zeros(1, np.int64), array).logits))


def peak_of(model: Any, context: Context) -> float:
    """The matmul peak in the format that the model's backbone computes in."""
    return matmul_peak(next(model.extractor.model.parameters()).dtype, context)


def pairs(context: Context) -> None:
    """ConcatSiamese and SplitSiamese from cached encodings: pairs/s and the share of the matmul peak."""
    size = project.sizes(context.is_quick)
    models: dict[str, tuple[Pairs, int, float]] = {}
    for name in ("concat", *size.splits):
        with context.attempt(name):
            model = Pairs(name, context)
            peak = peak_of(model.model, context)
            context.row(f"{name}: cost", "GFLOP/pair", model.gflop)
            models[name] = model, model.eager(size.pair_batches, peak), peak
    for name, (model, _, _) in models.items():
        model.through_scorer(CONCAT_WANTED if name == "concat" else None)
    # Compiling takes long, so it comes last, and only the model that costs most is compiled.
    for name, left_out in ((size.splits[-1], COMPILED), ("concat", ())):
        if name in models:
            model, n, peak = models[name]
            model.static(n, peak, left_out)


def token(context: Context) -> None:
    """TokenSiamese: images encoded and pairs scored per second."""
    size = project.sizes(context.is_quick)
    model = Pairs("token", context)
    side, n = model.model.transform.size[0], size.image_batches[-1]
    pixels = project.pixels_of(n, side).to(context.device)

    def encode() -> int:
        model.model.encode(pixels)
        return n

    with torch.inference_mode():
        context.row("token: encode, from tensors on the device", "images/s", rate(encode, context))
    peak = matmul_peak(torch.float32, context)
    best = model.eager(size.token_batches, peak)
    model.through_scorer(TOKEN_WANTED)
    model.static(best, peak, left_out=COMPILED[1:])


def embed(context: Context) -> None:
    """Embeddings from tensors on the device, from tensors in memory, and from JPEG files."""
    size = project.sizes(context.is_quick)
    for kind in ("vit", "cnn"):
        with context.attempt(f"embed {kind}, on the device"), torch.inference_mode():
            on_device(kind, size, context)
        with context.attempt(f"embed {kind}, from tensors in memory"):
            from_memory(kind, size, context)
    with context.attempt("embed from JPEG"):
        from_jpeg(size, context)
    with context.attempt("embed vit, static shapes"), torch.inference_mode():
        extractor = project.build_extractor("vit", size).prepare_for_inference(context.device)
        n = size.image_batches[1]
        pixels = project.pixels_of(n, extractor.transform.size[0]).to(context.device)
        for name, make in forms_of(extractor, context.is_gpu).items():
            if name == COMPILED[0]:
                continue
            forward = make([pixels])

            def some(forward: Any = forward) -> int:
                forward(pixels)
                return n

            context.row(f"vit, {name}, on the device, batches of {n}", "images/s", rate(some, context))


def on_device(kind: str, size: project.Sizes, context: Context) -> None:
    """The network alone."""
    extractor = project.build_extractor(kind, size).prepare_for_inference(context.device)
    for n in size.image_batches:
        pixels = project.pixels_of(n, extractor.transform.size[0]).to(context.device)

        def some(pixels: torch.Tensor = pixels) -> int:
            extractor(pixels)
            return len(pixels)

        context.row(f"{kind}, eager, on the device, batches of {n}", "images/s", rate(some, context))


def from_memory(kind: str, size: project.Sizes, context: Context) -> None:
    """The project's Embedder: uint8 tensors in memory to embeddings there."""
    from distributed_rerank.config.work import WorkConfig
    from distributed_rerank.extraction import Embedder

    extractor = project.build_extractor(kind, size)
    pixels = project.pixels_of(min(size.n_images, 2048), extractor.transform.size[0])
    for n in (None, size.image_batches[-1]):
        embedder = Embedder(project.build_extractor(kind, size), WorkConfig(images_per_batch=n))
        with Busy(context) as busy:
            found = rate(lambda embedder=embedder: len(embedder.embed(pixels)), context)
        name = "the project's own batches" if n is None else f"batches of {n}"
        wanted = EMBED_WANTED if kind == "vit" and n is None else None
        context.row(f"{kind}, from tensors in memory, {name}", "images/s", found, wanted)
        busy.report(f"{kind}, from tensors in memory, {name}")


def from_jpeg(size: project.Sizes, context: Context) -> None:
    """Files to embeddings in this process, and the decoding alone."""
    from distributed_rerank import extraction
    from distributed_rerank.config.work import WorkConfig
    from distributed_rerank.data.decoding import decode

    catalogue = project.photo_catalogue(context.work, size)
    config, work = project.extractor_config("vit", size), WorkConfig(decode_threads=project.CORES)
    refs = catalogue.images()[: 16 if context.is_quick else 2000]
    transform = project.build_extractor("vit", size).transform
    found = rate(lambda: len(decode(refs, transform, threads=project.CORES).kept), context, rounds=1)
    context.row(f"JPEG decoded alone, {project.CORES} threads", "images/s", found)
    blocks = extraction.plan(refs, work.images_per_block)

    def from_files() -> int:
        return sum(len(block.ids) for _, block in extraction.embed_blocks(blocks, config, work))

    context.row("vit, from JPEG, one process", "images/s", rate(from_files, context, rounds=1))


def search(context: Context) -> None:
    """Exact search, 10^6 x 10^4, 100 neighbours: with the project's portions, and all queries in one portion."""
    size = project.sizes(context.is_quick)
    gallery = project.search_side(project.planted_embeddings(size.n_gallery, size.dim, context.device), 0)
    queries = project.search_side(
        project.planted_embeddings(size.n_queries, size.dim, context.device, seed=1), size.n_gallery
    )
    shape = f"{size.n_gallery:,} x {size.n_queries:,} x {size.dim}, {size.n_neighbours} neighbours"
    project.search(queries.part(0, min(size.n_queries, 512)), gallery, size.n_neighbours)  # warm-up
    for name, options in (
        ("the project's portions", {}),
        ("all queries in one portion", {"queries_per_block": size.n_queries}),
    ):
        with context.attempt(name):

            def run(options: dict[str, int] = options) -> int:
                return len(project.search(queries, gallery, size.n_neighbours, **options).query_items)

            with Busy(context) as busy:
                seconds = size.n_queries / rate(run, context, rounds=1)
            context.row(f"search {shape}, {name}", "s", seconds, None if options else SEARCH_WANTED)
            busy.report(f"search, {name}")
    flop = 2 * size.n_gallery * size.n_queries * size.dim
    context.row("search: the matrix product alone, at the fp32 peak", "s", flop / matmul_peak(torch.float32, context))


def training(context: Context) -> None:
    """Training steps of ConcatSiamese, all weights trained: from pixels on the device, and from JPEG files."""
    from distributed_rerank.training.images import DecodedImages

    size = project.sizes(context.is_quick)
    catalogue = project.photo_catalogue(context.work, size)
    n, n_steps = (16, 2) if context.is_quick else (512, 12)
    for lists in size.train_lists:
        with context.attempt(f"training, {lists} lists a step"):
            model = project.build_pairwise("concat", size)
            task = project.training_task(
                catalogue, model, context.work / f"train-{lists}", n, epochs=1, lists_per_step=lists,
                steps_per_epoch=n_steps, loader_workers=project.CORES,
            )  # fmt: skip
            steps, model = project.steps_of(task), model.to(context.device)
            memory = project.ImagesInMemory(project.pixels_of(n, size.vit_size).to(context.device))
            files = DecodedImages(task.catalogue, model.transform, task.config, str(context.device))
            for name, images in (("pixels on the device", memory), ("JPEG files", files)):

                def some(images: Any = images, steps: Any = steps, model: Any = model, task: Any = task) -> int:
                    project.train(model, steps, images, task.config, context.device)
                    synchronise(context.device)
                    return sum(map(len, steps))

                with Busy(context) as busy:
                    found = rate(some, context, rounds=1)
                context.row(f"training, {len(steps[0])} pairs a step, from {name}", "pairs/s", found)
                busy.report(f"training, {len(steps[0])} pairs a step, from {name}")


def profile(context: Context) -> None:
    """The ten kernels that take the most time: scoring with concat and with token, training."""
    size = project.sizes(context.is_quick)
    for name in ("concat", "token"):
        with context.attempt(f"profile {name}"):
            model = Pairs(name, context)
            work = scorer_work(model.model, model.encoded, model.n_images, context)
            show_profile(f"scoring, {name}", work, context)
    with context.attempt("profile of a training step"):
        catalogue = project.photo_catalogue(context.work, size)
        n = 16 if context.is_quick else 256
        model = project.build_pairwise("concat", size)
        task = project.training_task(
            catalogue, model, context.work / "profile", n, epochs=1, lists_per_step=size.train_lists[-1],
            steps_per_epoch=3,
        )  # fmt: skip
        images = project.ImagesInMemory(project.pixels_of(n, size.vit_size).to(context.device))
        steps, model = project.steps_of(task), model.to(context.device)
        show_profile("training", lambda: len(project.train(model, steps, images, task.config, context.device)), context)


def show_profile(name: str, work: Callable[[], int], context: Context) -> None:
    """Rows of the top ten, and how much of the time any kernel ran."""
    work()
    synchronise(context.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if context.is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        started = time.perf_counter()
        work()
        synchronise(context.device)
        seconds = time.perf_counter() - started
    kernels, spent = top_kernels(found, context.is_gpu)
    context.row(f"profile of {name}: kernels, of the time", "%", 100 * spent / seconds)
    for place, (kernel, share, calls) in enumerate(kernels, start=1):
        context.row(f"profile of {name}, {place}: {kernel[:110]}, {calls:g} calls", "%", 100 * share)
