"""Is it found out that an extractor knows the train labels? Embeddings tuned on them to several degrees, or not at all.

    python benchmarks/seen_labels.py --catalogue DIR/df.csv --embeddings FOLDER_OF_EMBED

Tuned: multiplied by the whitening within the train labels, with little shrinkage (well known) to much. Not tuned: as
they are, also with halves of the categories as splits, and with few images a label in either split. A row tells mAP@10
of the train lists (`ours`), of the validation lists (`theirs`), and their ratio; the last column is what `train` finds.
Labels of the validation split serve for that column only.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measuring import Row, add_common_flags, against, describe_machine, finish
from torch import Tensor
from torch.nn.functional import normalize

from distributed_rerank.config.training import EvidenceConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.demo.catalogue import write_demo_catalogue
from distributed_rerank.training.seen_labels import mean_average_precision, pick_labels

SHRINKAGES = (0.05, 0.3, 0.7, 0.9)


def cases(catalogue: Catalogue, x: Tensor) -> Iterator[tuple[str, Catalogue, Tensor]]:
    """Name, catalogue and embeddings of each case."""
    splits = catalogue.table["split"].to_numpy()
    by_category = splits if catalogue.categories is None else half_of(catalogue.categories)
    for name, other in {"as it is": splits, "other halves": by_category}.items():
        part = with_splits(catalogue, other)
        yield f"{name}, not tuned", part, x
        for shrinkage in SHRINKAGES:
            yield f"{name}, tuned, shrinkage {shrinkage}", part, tuned(part, x, shrinkage)
    for n_images in (2, 3, 8):
        for few in ("train", "validation"):
            part, own = few_images(catalogue, x, few, n_images)
            yield f"{n_images} images a label in {few}, not tuned", part, own
            yield f"{n_images} images a label in {few}, tuned, shrinkage 0.3", part, tuned(part, own, 0.3)


def half_of(categories: np.ndarray) -> np.ndarray:
    """Splits by category: half of them train, drawn by a fixed seed."""
    names = np.unique(categories)
    drawn = np.random.default_rng(0).permutation(names)[: len(names) // 2]
    return np.where(np.isin(categories, drawn), "train", "validation")


def with_splits(catalogue: Catalogue, splits: np.ndarray) -> Catalogue:
    return Catalogue(catalogue.table.assign(split=splits), catalogue.source)


def few_images(catalogue: Catalogue, x: Tensor, split: str, n_images: int) -> tuple[Catalogue, Tensor]:
    """The catalogue with `n_images` of each label in one split."""
    order = pd.Series(np.random.default_rng(1).random(len(catalogue))).groupby(catalogue.labels).rank()
    kept = np.flatnonzero((catalogue.table["split"] != split).to_numpy() | (order <= n_images).to_numpy())
    return catalogue.take(kept), x[kept]


def tuned(catalogue: Catalogue, x: Tensor, shrinkage: float) -> Tensor:
    """The embeddings whitened by the covariance within the train labels, in all directions."""
    train = torch.from_numpy(np.flatnonzero(catalogue.table["split"] == "train"))
    mean = x[train].double().mean(dim=0)
    own = x[train].double() - mean
    _, label, counts = torch.from_numpy(catalogue.labels.astype(np.int64))[train].unique(
        return_inverse=True, return_counts=True
    )
    means = own.new_zeros(len(counts), own.shape[1]).index_add_(0, label, own) / counts[:, None]
    covariance = torch.cov((own - means[label]).T)
    level = covariance.diagonal().mean() * torch.eye(len(covariance))
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * level)
    return normalize((x.double() - mean) @ (vectors / values.sqrt())).float()


def measure(name: str, catalogue: Catalogue, x: Tensor) -> Row:
    """mAP@10 of both splits, and whether `train` would say that the train labels are known."""
    found = []
    for split in ("train", "validation"):
        rows = torch.from_numpy(np.flatnonzero(catalogue.table["split"] == split))
        labels = torch.from_numpy(catalogue.labels.astype(np.int64))[rows]
        found.append(mean_average_precision(x[rows], labels, torch.full_like(labels, -1), torch.arange(len(rows))))
    embeddings = Embeddings(catalogue.ids, x.numpy())
    used = pick_labels(catalogue, None, EvidenceConfig(), lambda images: embeddings)
    return against(f"{name}: {'no evidence' if used.note['seen'] else 'taken as evidence'}", "mAP@10", *found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--catalogue", help="table with the splits train and validation; needed unless --quick")
    parser.add_argument("--embeddings", type=Path, help="folder of `embed`; needed unless --quick")
    arguments = parser.parse_args()
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            path = write_demo_catalogue(Path(temporary) / "catalogue", n_designs=24, n_images=4, size=48)
            catalogue = read_catalogue(str(path), purpose="training")
            x = torch.randn(len(catalogue), 16, generator=torch.Generator().manual_seed(0))
        else:
            catalogue, embeddings = read_catalogue(arguments.catalogue), read_embeddings(arguments.embeddings)
            x = torch.from_numpy(embeddings.matrix[embeddings.rows_of(catalogue.ids)])
        rows = [measure(*case) for case in cases(catalogue, normalize(x))]
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
