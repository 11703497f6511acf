"""What the tests of training share: drawn images, a tiny backbone, a task that trains in seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.extraction import embed
from distributed_rerank.training.stage import make_task
from distributed_rerank.training.task import TrainingTask

BACKBONE = ExtractorConfig(name="test_resnet", weights="none", image_size=32, resize="square", precision="fp32")
TOKENS = TokenSiameseConfig(
    extractor=BACKBONE, depths=(-2, -1), grid=3, token_dim=16, pools=(1, 2), global_dim=16, head_dropout=0.0
)
SMALL = TrainingConfig(
    epochs=3,
    steps_per_epoch=None,
    lr=1e-2,
    lists_per_step=8,
    n_negatives=3,
    n_items=10,
    top_n=10,
    warmup_steps=1,
    patience=0,
    encode_block=16,
    set_aside=0.3,
    score_pairs=32,
)


def draw_catalogue(folder: Path, n_labels: int = 10, n_images: int = 4, seed: int = 0) -> Catalogue:
    """`n_labels` designs of two coloured shapes, each in `n_images` places, as PNG files with a table."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    rows = ["label,path,split,is_query,is_gallery"]
    for label in range(n_labels):
        colours = [tuple(int(c) for c in generator.integers(0, 256, 3)) for _ in range(3)]
        for image in range(n_images):
            picture = Image.new("RGB", (40, 40), colours[0])
            pen = ImageDraw.Draw(picture)
            x, y = (int(v) for v in generator.integers(0, 16, 2))
            pen.ellipse((x, y, x + 12 + label, y + 14), fill=colours[1])
            pen.rectangle((y + 6, x + 6, y + 14, x + 8 + label), fill=colours[2])
            noise = generator.integers(-12, 13, (40, 40, 3))
            pixels = np.clip(np.asarray(picture).astype(int) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}-{image}.png")
            rows.append(f"{label},{label}-{image}.png,train,,")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return read_catalogue(str(folder / "table.csv"), purpose="training")


def build_task(folder: Path, model_config: Any = TOKENS, **changes: Any) -> TrainingTask:
    """A task on a drawn catalogue under `folder`, with `SMALL` changed as given."""
    catalogue = draw_catalogue(folder / "images").restrict("train").as_query_and_gallery()
    embeddings = embed(catalogue, BACKBONE, folder / "embeddings")
    return make_task(catalogue, embeddings, model_config, replace(SMALL, **changes), folder)
