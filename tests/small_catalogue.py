"""A small catalogue of generated pictures, tiny untrained models, and candidate lists of it."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig, DistanceSiameseConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.tensors.candidate_lists import CandidateLists

EXTRACTOR = ExtractorConfig(
    name="resnet10t", weights="none", image_size=32, resize="square", precision="fp32", normalise=False
)


def make_catalogue(folder: Path, n_images: int, broken: tuple[int, ...] = ()) -> Catalogue:
    """`n_images` pictures of 40 x 30 noise, all queries and gallery items; `broken` ones are no pictures."""
    folder.mkdir(exist_ok=True, parents=True)
    rows = ["path,label,split,is_query,is_gallery"]
    for number in range(n_images):
        name = f"picture_{number:03d}.png"
        save_picture(folder / name, number)
        if number in broken:
            (folder / name).write_bytes(b"this is no picture")
        rows.append(f"{name},{number // 4},validation,1,1")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return read_catalogue(str(folder / "table.csv"))


def write_table(folder: Path, n_images: int) -> Catalogue:
    """A table of images that nobody opens: 20 of a label, two of these of one sequence, every sixth a query."""
    numbers = np.arange(n_images)
    table = pd.DataFrame({"path": [f"{n:05d}.jpg" for n in numbers], "label": numbers // 20, "split": "validation"})
    table["is_query"], table["is_gallery"] = numbers % 6 == 0, True
    table["sequence"] = np.where(numbers % 20 < 2, [f"film {n // 20}" for n in numbers], "")
    table.to_csv(folder / "df.csv", index=False)
    return read_catalogue(str(folder / "df.csv"))


def planted_embeddings(n_images: int) -> np.ndarray:
    """Embeddings that lie around centres, a hundred around each; some are equal, so that distances tie."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((n_images // 100, 6)) @ rng.standard_normal((6, 16))
    matrix = centres[rng.integers(len(centres), size=n_images)] + 2 * rng.standard_normal((n_images, 16))
    matrix[n_images // 2 :][:30] = matrix[0]
    return matrix.astype(np.float32)


def save_picture(path: Path, seed: int) -> None:
    """Noise that is the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_lists(catalogue: Catalogue, n_items: int, seed: int = 0) -> CandidateLists:
    """Random candidates of every item, distances ascending; every third list is one shorter."""
    n = len(catalogue)
    generator = np.random.default_rng(seed)
    items = np.stack([generator.permutation(np.delete(np.arange(n), query))[:n_items] for query in range(n)])
    distances = np.sort(generator.random((n, n_items)).astype(np.float32), axis=1)
    items[::3, -1], distances[::3, -1] = -1, np.inf
    return CandidateLists.from_arrays(np.arange(n), items, distances)


def concat_model() -> ConcatSiamese:
    """A pairwise model whose encoding is the pixels."""
    return ConcatSiamese(ConcatSiameseConfig(extractor=EXTRACTOR, hidden_dims=(8,)))


def distance_model() -> DistanceSiamese:
    """A pairwise model whose encoding is a float32 embedding."""
    return DistanceSiamese(DistanceSiameseConfig(extractor=EXTRACTOR))
