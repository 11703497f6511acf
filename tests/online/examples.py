"""Saved models of every kind with a chain, and lists of a small catalogue, for the tests of online re-ranking."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from small_catalogue import save_picture

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import (
    ConcatSiameseConfig,
    DistanceSiameseConfig,
    PairwiseConfig,
    SplitSiameseConfig,
    TokenSiameseConfig,
)
from distributed_rerank.models.saving import build_model, save_model

CNN = ExtractorConfig(name="resnet10t", weights="none", image_size=32)
VIT = ExtractorConfig(
    name="vit_small_patch16_224", weights="none", args={"depth": 3, "embed_dim": 64, "num_heads": 2}, image_size=48
)
KINDS: dict[str, PairwiseConfig] = {
    "token": TokenSiameseConfig(extractor=CNN, token_dim=32, global_dim=32, grid=3),
    "token of a ViT": TokenSiameseConfig(extractor=VIT, depths=(-1,), token_dim=32, global_dim=32, grid=3),
    "concat": ConcatSiameseConfig(extractor=CNN, hidden_dims=(8,)),
    "split": SplitSiameseConfig(extractor=VIT, split_at=1),
    "distance": DistanceSiameseConfig(extractor=CNN, identity_init=False),
}
TOP_N, N_ITEMS = 9, 13
N_IMAGES = 45
BROKEN = (5, 31)


def save_example(kind: str, folder: Path, **step: object) -> Path:
    """A model folder with random weights in its head, and a chain with a pairwise step and a calibration."""
    model = build_model(KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_model(model, folder)
    first = {"step": "pairwise", "top_n": TOP_N, "rule": "fuse", "weight": 0.7, "temperature": 0.3} | step
    chain = {"schema_version": 2, "steps": [first], "calibration": {"slope": 1.5, "intercept": 0.25}}
    (folder / "chain.json").write_text(json.dumps(chain))
    return folder


def write_photos(folder: Path) -> Path:
    """A table of ids and paths, in another order than the ids'; some files are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in np.random.default_rng(5).permutation(N_IMAGES).tolist():
        save_picture(folder / f"{number}.png", number)
        if number in BROKEN:
            (folder / f"{number}.png").write_bytes(b"this is no picture")
        rows.append((f"id {number:02d}", f"{number}.png"))
    pd.DataFrame(rows, columns=["id", "path"]).to_csv(folder / "photos.csv", index=False)
    return folder / "photos.csv"


def write_lists(path: Path) -> pd.DataFrame:
    """Lists of every readable image, some of them short, with equal distances in many places."""
    generator = np.random.default_rng(0)
    rows = []
    for query in range(N_IMAGES):
        if query in BROKEN:
            continue
        others = generator.permutation([item for item in range(N_IMAGES) if item != query])
        n_items = N_ITEMS if query % 4 else 3
        distances = np.sort(generator.integers(0, 8, n_items) / np.float32(7))
        rows += [
            (f"id {query:02d}", f"id {item:02d}", distance)
            for item, distance in zip(others[:n_items].tolist(), distances, strict=True)
        ]
    table = pd.DataFrame(rows, columns=["query_id", "gallery_id", "distance"])
    table.to_parquet(path)
    return table
