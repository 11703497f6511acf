"""What the parts of gpu.py make of the project: its models, a catalogue of photos, embeddings, a training task.

Every import of the project stands in the function that needs it, so that a part which cannot import something loses
only itself.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CORES = len(os.sched_getaffinity(0))
IMAGES_PER_LABEL = 8


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    vit: str
    vit_size: int
    splits: tuple[str, ...]
    """Which SplitSiamese models, the cheapest last."""
    cnn: str
    cnn_size: int
    n_photos: int
    """JPEG files; a catalogue may name each more than once."""
    photo_size: tuple[int, int]
    n_images: int
    """Rows of the catalogue, and images in memory."""
    pair_batches: tuple[int, ...]
    token_batches: tuple[int, ...]
    image_batches: tuple[int, ...]
    n_scored_queries: int
    top_n: int
    n_gallery: int
    n_queries: int
    dim: int
    n_neighbours: int
    train_lists: tuple[int, ...]
    """Lists of 6 pairs in a training step."""


FULL = Sizes(
    vit="vit_small_patch16_224", vit_size=224, splits=("split-8", "split-10"), cnn="mobilenetv2_100", cnn_size=160,
    n_photos=1000, photo_size=(400, 300), n_images=4000,
    pair_batches=(64, 256, 1024), token_batches=(1024, 8192, 65_536), image_batches=(64, 256, 1024),
    n_scored_queries=1000, top_n=50, n_gallery=1_000_000, n_queries=10_000, dim=384, n_neighbours=100,
    train_lists=(4, 32),
)  # fmt: skip
QUICK = Sizes(
    vit="test_vit", vit_size=32, splits=("split-4",), cnn="test_resnet", cnn_size=32,
    n_photos=32, photo_size=(80, 60), n_images=64,
    pair_batches=(4, 8), token_batches=(16, 64), image_batches=(4, 8),
    n_scored_queries=8, top_n=4, n_gallery=3000, n_queries=100, dim=32, n_neighbours=10,
    train_lists=(2,),
)  # fmt: skip


def sizes(is_quick: bool) -> Sizes:
    """Those of the run."""
    return QUICK if is_quick else FULL


def extractor_config(kind: str, size: Sizes, precision: Any = "auto") -> Any:
    """The config of the untrained `vit` or `cnn`."""
    from distributed_rerank.config.extractor import ExtractorConfig

    name, side = (size.vit, size.vit_size) if kind == "vit" else (size.cnn, size.cnn_size)
    return ExtractorConfig(name=name, weights="none", image_size=side, precision=precision, resize="square")


def build_pairwise(name: str, size: Sizes, precision: Any = "auto", storage: str | None = None) -> Any:
    """An untrained pairwise model: concat, split-<block> or token; `storage` is the format of its encodings."""
    from distributed_rerank.config.pairwise import ConcatSiameseConfig, SplitSiameseConfig, TokenSiameseConfig
    from distributed_rerank.models.saving import build_model

    vit = extractor_config("vit", size, precision)
    if name == "concat":
        return build_model(ConcatSiameseConfig(extractor=vit, dropout=0.0))
    if name.startswith("split-"):
        kept: Any = {"storage": "fp32"} if storage == "float32" else {}
        config = SplitSiameseConfig(extractor=vit, split_at=int(name.removeprefix("split-")), **kept)
        return build_model(config)
    assert name == "token", f"no model {name!r}"
    kept = {"token_storage": storage} if storage else {}
    return build_model(TokenSiameseConfig(extractor=extractor_config("cnn", size, precision), **kept))


def build_extractor(kind: str, size: Sizes, precision: Any = "auto") -> Any:
    """An untrained extractor: vit or cnn."""
    from distributed_rerank.models.extractor import build_extractor

    return build_extractor(extractor_config(kind, size, precision))


def has_bf16(device: torch.device) -> bool:
    """Whether the project computes in bfloat16 on the device by itself."""
    from distributed_rerank.models.precision import resolve_precision

    return resolve_precision("auto", device) == torch.bfloat16


def pixels_of(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """Images uint8 [n, 3, side, side] as smooth as photos: pure noise would look the same in all of them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.randint(0, 32, (n, 1, side, side), generator=generator)
    return (smooth * 223 + noise).to(torch.uint8)


def write_photos(folder: Path, size: Sizes) -> Path:
    """JPEG photos and the table of a catalogue of `n_images`, all of them both; made once, whoever asks first.

    The rows go through the photos again and again, each with an id of its own.
    """
    table = folder / "table.csv"
    if table.is_file():
        return table
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)

    def write(number: int) -> None:
        grid = np.random.default_rng(number).integers(256, size=(8, 10, 3), dtype=np.uint8)
        photo = Image.fromarray(grid).resize(size.photo_size, Image.Resampling.BICUBIC)
        photo.save(unfinished / f"{number:05d}.jpg", quality=90)

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(write, range(size.n_photos)))
    rows = ["id,label,path,split,is_query,is_gallery"]
    for number in range(size.n_images):
        label, split = number // IMAGES_PER_LABEL, "validation"
        rows.append(f"{number:06d},{label},{number % size.n_photos:05d}.jpg,{split},True,True")
    (unfinished / "table.csv").write_text("\n".join(rows) + "\n")
    try:
        unfinished.rename(folder)
    except OSError:  # another part was faster
        assert table.is_file(), f"{folder} is there without its table"
    return table


def photo_catalogue(work: Path, size: Sizes) -> Any:
    """The catalogue of the photos."""
    from distributed_rerank.data.catalogue_files import read_catalogue

    return read_catalogue(str(write_photos(work / "photos", size)), purpose="evaluation")


def random_lists(size: Sizes) -> Any:
    """`top_n` random candidates for each of the scored queries, never the query itself."""
    from distributed_rerank.tensors.candidate_lists import CandidateLists

    rng = np.random.default_rng(1)
    queries = np.arange(size.n_scored_queries)
    items = np.stack([rng.permutation(size.n_images - 1)[: size.top_n] for _ in queries])
    items += items >= queries[:, None]
    distances = np.sort(rng.random(items.shape, dtype=np.float32), axis=1)
    return CandidateLists.from_arrays(queries, items.astype(np.int64), distances)


def planted_embeddings(n: int, dim: int, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    """Embeddings of length 1; those of one label, eight in a row, lie near each other."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(-(-n // IMAGES_PER_LABEL), dim, generator=generator, device=device)
    spread = torch.randn(n, dim, generator=generator, device=device)
    embeddings = centres.repeat_interleave(IMAGES_PER_LABEL, dim=0)[:n] + spread
    return torch.nn.functional.normalize(embeddings, dim=1)


def search_side(embeddings: torch.Tensor, first_item: int) -> Any:
    """Embeddings as the search takes them, items numbered from `first_item`, of no sequence."""
    from distributed_rerank.retrieval import SearchSide

    n = len(embeddings)
    return SearchSide(embeddings.cpu().numpy(), np.arange(first_item, first_item + n), np.full(n, -1))


def search(queries: Any, gallery: Any, n_neighbours: int, **options: Any) -> Any:
    """Candidate lists of all queries by the project's search, with its default portions or those given."""
    from distributed_rerank import retrieval
    from distributed_rerank.config.work import WorkConfig
    from distributed_rerank.tensors import sharding
    from distributed_rerank.tensors.candidate_lists import concatenate

    work = WorkConfig(**options)
    blocks = list(enumerate(sharding.blocks(len(queries.items), work.queries_per_search_block)))
    found = dict(retrieval.search_blocks(blocks, queries, gallery, n_neighbours, work))
    return concatenate([found[number].lists for number, _ in blocks])


def training_task(catalogue: Any, model: Any, folder: Path, n_labelled: int, **options: Any) -> Any:
    """A task of one run that trains all weights of `model` on the first images, near ones as candidates."""
    from distributed_rerank.config.training import TrainingConfig
    from distributed_rerank.models.saving import save_model
    from distributed_rerank.training.task import TrainingRun, TrainingTask

    images = catalogue.take(np.arange(n_labelled)).as_query_and_gallery()
    embeddings = planted_embeddings(n_labelled, 64)
    side = search_side(embeddings, 0)
    usual = {"n_negatives": 5, "lr": 1e-3, "backbone_lr": 1e-4, "warmup_steps": 0, "schedule": "constant"}
    config = TrainingConfig(n_items=min(50, n_labelled - 1), top_n=2, **{**usual, **options})
    lists = search(side, side, config.n_items)
    save_model(model, folder)
    return TrainingTask(
        catalogue=images,
        config=config,
        model_folder=folder,
        embeddings=embeddings,
        runs=(TrainingRun("all", lists, None),),
    )


def steps_of(task: Any, epoch: int = 0) -> list[Any]:
    """The steps of an epoch of the task."""
    from distributed_rerank.training.task import plan_epoch

    return plan_epoch(task, task.runs[0], epoch)


class ImagesInMemory:
    """Pixels of all items on the device: a training step without the reading of files."""

    is_encoded = False

    def __init__(self, pixels: torch.Tensor) -> None:
        self._pixels = pixels

    def fetch(self, items: torch.Tensor, epoch: int, step: int) -> torch.Tensor:
        """The items' pixels."""
        return self._pixels[items.to(self._pixels.device)]


def train(model: Any, steps: list[Any], images: Any, config: Any, device: torch.device) -> list[float]:
    """The losses of one epoch of these steps; the model is trained in place."""
    from distributed_rerank.training.epoch import train_epoch
    from distributed_rerank.training.state import TrainingState, build_optimizer
    from distributed_rerank.training.task import TrainingWorker

    state = TrainingState(model, build_optimizer(model, config))
    return train_epoch(state, steps, images, config, TrainingWorker(device=str(device)))
