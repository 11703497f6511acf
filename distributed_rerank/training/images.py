"""The images of a training step: decoded and augmented anew, or encodings that a frozen backbone gave once.
Layer 3.

Encodings lie in blocks of a fixed size in the run's folder. The workers share the blocks, so each image is
encoded by one of them, and a run that goes on after a kill finds the finished blocks.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.images import read_image
from distributed_rerank.data.transforms import InferenceTransform, TrainingTransform
from distributed_rerank.tensors import sharding
from distributed_rerank.training.plan import seed_of


class DecodedImages:
    """Images of the catalogue as the model's pixels; augmented where a step is trained on, plain
    elsewhere."""

    is_encoded = False

    def __init__(
        self, catalogue: Catalogue, transform: InferenceTransform, config: TrainingConfig, device: str = "cpu"
    ) -> None:
        self.catalogue = catalogue
        self.config = config
        self.device = device
        self.transform = transform
        self.augment = config.augmentation and TrainingTransform(
            config.augmentation, transform.size, transform.interpolation
        )
        self.pool = ThreadPoolExecutor(config.loader_workers) if config.loader_workers else None

    def fetch(self, items: Tensor, epoch: int, step: int) -> UInt8[Tensor, "item 3 height width"]:
        """The items' pixels, augmented by a seed of (seed, epoch, step, item)."""
        seeds = [seed_of(self.config.seed, epoch, step, item) for item in items.tolist()]
        return self._read(items, self.augment, seeds)

    def plain(self, items: Tensor) -> UInt8[Tensor, "item 3 height width"]:
        """The items' pixels as at inference."""
        return self._read(items, None, [0] * len(items))

    def view(self, items: Tensor, view: int) -> UInt8[Tensor, "item 3 height width"]:
        """View 0 is the plain image, every other one an augmented one of its own."""
        if view == 0:
            return self.plain(items)
        return self._read(items, self.augment, [seed_of(self.config.seed, view, item) for item in items.tolist()])

    def _read(self, items: Tensor, augment: TrainingTransform | None, seeds: list[int]) -> Tensor:
        def one(ref_and_seed: tuple) -> Tensor:
            image = read_image(ref_and_seed[0])
            if augment is None:
                return self.transform(image)
            return augment(image, torch.Generator().manual_seed(ref_and_seed[1]))

        wanted = list(zip(self.catalogue.images(items.numpy()), seeds, strict=True))
        pixels = torch.stack(list(self.pool.map(one, wanted) if self.pool else map(one, wanted)))
        return pixels.to(self.device)


class EncodedImages:
    """Encodings from block files; a step sees one of the views of each item, drawn by (seed, epoch, step,
    item)."""

    is_encoded = True

    def __init__(self, folder: Path, n_items: int, config: TrainingConfig) -> None:
        self.config = config
        self.n_items = n_items
        self.views = [
            [
                torch.load(block_path(folder, view, block), mmap=True, weights_only=True)
                for block in range(len(blocks_of(n_items, config)))
            ]
            for view in range(config.views)
        ]

    def fetch(self, items: Tensor, epoch: int, step: int) -> Tensor:
        """The items' encodings, each from the view that this step draws."""
        found = self.view(items, 0)
        if self.config.views == 1:
            return found
        # Drawn for all items, so that an item's view does not depend on which others a worker has.
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch, step))
        drawn = torch.randint(self.config.views, (self.n_items,), generator=generator)[items]
        for view in range(1, self.config.views):
            found[drawn == view] = self.view(items[drawn == view], view)
        return found

    def plain(self, items: Tensor) -> Tensor:
        """The items' encodings as at inference."""
        return self.view(items, 0)

    def view(self, items: Int64[Tensor, " item"], view: int) -> Tensor:
        """One view of the items, in their order."""
        blocks = self.views[view]
        found = torch.empty(len(items), *blocks[0].shape[1:], dtype=blocks[0].dtype)
        numbers, places = items // self.config.encode_block, items % self.config.encode_block
        for number in numbers.unique().tolist():
            rows = numbers == number
            found[rows] = blocks[number][places[rows]]
        return found


def blocks_of(n_items: int, config: TrainingConfig) -> list[tuple[int, int]]:
    """Start and stop of the blocks of one view."""
    return sharding.blocks(n_items, config.encode_block)


def block_path(folder: Path, view: int, block: int) -> Path:
    """Where one block of one view lies."""
    return folder / f"view-{view:02d}" / f"block-{block:08d}.pt"
