"""This project's side of compare_oml.py: the figures of oml_peer.py, with the same files, weights, pairs and threads.

    python _ours.py CATALOGUE_DIR OML_OUT --precision bf16 --threads 2 --out pairs.npz

Everything is timed as oml_peer.py does: from the JPEG files, with the models built before the clock starts. Only with
--workers is the start of Ray's workers inside the time. The last line of the output is a JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from distributed_rerank import extraction, retrieval
from distributed_rerank.cluster.executors import RayExecutors
from distributed_rerank.cluster.session import connect
from distributed_rerank.config.augmentation import Augmentation
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.decoding import decode
from distributed_rerank.data.gathering import gather_lists
from distributed_rerank.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from distributed_rerank.executors import Executors
from distributed_rerank.extraction import Embedder
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.retrieval import SearchSide
from distributed_rerank.runtime.devices import torch_threads
from distributed_rerank.scoring.stage import score_candidates
from distributed_rerank.tensors import metrics, oml_metrics
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.training.epoch import train_epoch
from distributed_rerank.training.images import DecodedImages
from distributed_rerank.training.plan import TrainingStep, plan_batches
from distributed_rerank.training.state import TrainingState, build_optimizer
from distributed_rerank.training.task import TrainingWorker

AS_OML = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
"""OML's get_augs_torch: resize and mirror; its ColorJitter() has no strength and does nothing."""


def extractor_config(weights: str, precision: Any) -> ExtractorConfig:
    """ViT-S/16 as OML feeds it."""
    return ExtractorConfig(
        name="vit_small_patch16_224.dino",
        weights=weights,
        image_size=224,
        resize="square",
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        normalise=False,
        precision=precision,
    )


def load_siamese(weights: Path, precision: str) -> ConcatSiamese:
    """OML's ConcatSiamese with OML's weights."""
    return ConcatSiamese(
        ConcatSiameseConfig(extractor=extractor_config("none", precision), pairwise_weights=str(weights))
    )


def backbone_weights(siamese: Path, folder: Path) -> str:
    """The extractor's part of the ConcatSiamese state, as a file of its own."""
    state = torch.load(siamese, weights_only=True)
    path = folder / "backbone.pth"
    torch.save({name: value for name, value in state.items() if name.startswith("extractor.")}, path)
    return str(path)


def oml_pairs(catalogue: Catalogue, table: pd.DataFrame, oml: Path) -> tuple[CandidateLists, np.ndarray, np.ndarray]:
    """OML's candidate lists in our item numbers, and the row and column of each of its pairs in them."""
    with np.load(oml / "candidates.npz") as pairs:
        query, gallery, distance = (pairs[name] for name in ("query_ids", "gallery_ids", "distances"))
    paths = table["path"].to_numpy()
    rank = pd.Series(query).groupby(query).cumcount().to_numpy() + 1
    columns = {"query_id": paths[query], "gallery_id": paths[gallery], "rank": rank, "distance": distance}
    lists = gather_lists([pa.table(columns)], catalogue)
    return lists, np.searchsorted(lists.query_items.numpy(), catalogue.items_of(paths[query])), rank - 1


def time_embedding(catalogue: Catalogue, config: ExtractorConfig, work: WorkConfig) -> tuple[float, np.ndarray]:
    """Images per second of decoding and embedding in this process, and the embeddings."""
    embedder = Embedder(extractor := build_extractor(config), work)
    started, parts = time.perf_counter(), []
    for _, refs in extraction.plan(catalogue.images(), work.images_per_block):
        parts.append(embedder.embed(decode(refs, extractor.transform, threads=work.decode_threads or 1).pixels))
    return len(catalogue) / (time.perf_counter() - started), np.concatenate(parts)


def time_embedding_stage(
    catalogue: Catalogue, config: ExtractorConfig, work: WorkConfig, folder: Path, executors: Executors | None
) -> float:
    """Images per second of the embedding stage, its folder included."""
    started = time.perf_counter()
    extraction.embed(catalogue, config, folder, work=work, executors=executors)
    return len(catalogue) / (time.perf_counter() - started)


def time_reranking(
    catalogue: Catalogue,
    lists: CandidateLists,
    model: ConcatSiamese,
    top_n: int,
    work: WorkConfig,
    folder: Path,
    executors: Executors | None,
) -> tuple[float, torch.Tensor]:
    """Pairs per second of the scoring stage, from image files to its folder, and the logits."""
    started = time.perf_counter()
    scored = score_candidates(catalogue, lists, model, top_n, folder, work=work, executors=executors)
    seconds = time.perf_counter() - started
    assert scored.logits is not None, "pairs were scored"
    return scored.n_pairs / seconds, scored.logits


def time_training(
    catalogue: Catalogue, embeddings: np.ndarray, model: ConcatSiamese, n_steps: int, threads: int
) -> float:
    """Pairs per second of OML's recipe: 4 x 4 images decoded and augmented, hard pairs, BCE, all weights trained."""
    config = TrainingConfig(
        mining="batch", loss="bce", n_labels=4, n_instances=4, lr=1e-4, backbone_lr=1e-4, warmup_steps=0,
        schedule="constant", augmentation=AS_OML, threads=threads, loader_workers=1,
    )  # fmt: skip
    steps: list[TrainingStep] = []
    while len(steps) < n_steps + 1:
        items, epoch = np.arange(len(catalogue)), len(steps)
        steps += plan_batches(items, catalogue.labels.astype(np.int64), torch.from_numpy(embeddings), config, epoch)
    state = TrainingState(model, build_optimizer(model, config))
    images = DecodedImages(catalogue, model.transform, config)
    with torch_threads(threads):
        train_epoch(state, steps[:1], images, config, TrainingWorker())
        started = time.perf_counter()
        train_epoch(state, steps[1 : n_steps + 1], images, config, TrainingWorker())
    return sum(map(len, steps[1 : n_steps + 1])) / (time.perf_counter() - started)


def time_search(threads: int) -> tuple[dict[str, float], np.ndarray]:
    """Queries per second of exact search and of the nine metrics on oml_peer.py's random embeddings; the ids found."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 384, generator=generator) for n in (10_000, 50_000))
    query_labels, gallery_labels = (torch.randint(0, 5_000, (n,), generator=generator) for n in (10_000, 50_000))
    # Numbers above the gallery's, so that no query is taken for a gallery item.
    own, others = torch.arange(50_000, 60_000), torch.arange(50_000)
    searched_for, searched_in = (
        SearchSide(e.numpy(), i.numpy(), np.full(len(i), -1)) for e, i in ((queries, own), (gallery, others))
    )
    work = WorkConfig(threads_per_worker=threads)
    with torch_threads(threads):
        started = time.perf_counter()
        ((_, searched_block),) = retrieval.search_blocks([(0, (0, 10_000))], searched_for, searched_in, 100, work)
        searched = time.perf_counter()
        found = searched_block.lists.items
        is_relevant = metrics.relevance(found, query_labels, gallery_labels)
        n_relevant = metrics.count_relevant(own, query_labels, None, others, gallery_labels, None)
        lengths = (found >= 0).sum(dim=1)
        metrics.means(oml_metrics.per_query(is_relevant, lengths, n_relevant, (1, 5, 10)))
        measured = time.perf_counter()
    rates = {
        "knn_queries_per_s": 10_000 / (searched - started),
        "metrics_queries_per_s": 10_000 / (measured - searched),
    }
    return rates, found.numpy().astype(np.int32)


def measure(arguments: argparse.Namespace, folder: Path, executors: Executors | None) -> dict[str, float]:
    """All figures that are asked for; writes the pair distances, and the ids found, beside each other."""
    catalogue = read_catalogue(str(arguments.catalogue / "df.csv"), purpose="evaluation")
    lists, row, column = oml_pairs(catalogue, pd.read_csv(arguments.catalogue / "df.csv"), arguments.oml)
    threads, is_on_ray = arguments.threads, arguments.workers > 0
    weights = arguments.oml / "concat_siamese.pth"
    model = load_siamese(weights, arguments.precision)
    extractor = extractor_config(backbone_weights(weights, folder), arguments.precision)
    work = WorkConfig(
        images_per_block=16 if is_on_ray else 256,
        threads_per_worker=1 if is_on_ray else threads,
        decode_threads=1 if is_on_ray else threads,
    )
    figures: dict[str, float] = {}
    figures["rerank_pairs_per_s"], logits = time_reranking(
        catalogue, lists, model, arguments.top_n, work, folder / "pairs", executors
    )
    arrays = {"pair_distances": logits[row, column].sigmoid().numpy()}
    if is_on_ray:
        figures["embed_images_per_s"] = time_embedding_stage(
            catalogue, extractor, work, folder / "embeddings", executors
        )
    else:
        figures["embed_images_per_s"], embeddings = time_embedding(catalogue, extractor, work)
        trained = load_siamese(weights, arguments.precision)
        figures["train_pairs_per_s"] = time_training(catalogue, embeddings, trained, arguments.train_steps, threads)
    if arguments.search:
        rates, arrays["knn_items"] = time_search(threads)
        figures |= rates
    np.savez(arguments.out, allow_pickle=False, **arrays)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("oml", type=Path, help="the folder that oml_peer.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--top-n", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="Ray workers of one thread each; 0 = this process")
    parser.add_argument("--train-steps", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="measure search and metrics too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.workers:
            with connect(ClusterConfig(num_workers=arguments.workers, use_gpu=False)) as session:
                figures = measure(arguments, Path(folder), RayExecutors(lambda: session))
        else:
            figures = measure(arguments, Path(folder), None)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
