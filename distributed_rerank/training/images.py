"""The images of a training step: decoded and augmented anew, or encodings, or pair features, computed once.

Encodings of a frozen backbone lie in block files of a fixed size in the run's folder (`encodings` writes them). Pair
features are kept in memory where nothing that is trained comes before them: then only the head runs in a step.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from distributed_rerank.config.training import TrainingConfig
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.data.transforms import InferenceTransform, TrainingTransform
from distributed_rerank.errors import BadInput
from distributed_rerank.tensors import sharding
from distributed_rerank.tensors.candidate_lists import CandidateLists
from distributed_rerank.training.plan import seed_of

MAX_PAIRS = 2_000_000
"""Features of more pairs are not kept, to save memory (about 250 bytes a pair)."""
PAIRS_PER_CALL = 128
"""Measured on a CPU: small enough for the cache, large enough for the calls not to count."""


class DecodedImages:
    """Pixels of the catalogue's images as the model wants them; augmented for training, plain elsewhere."""

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
        n_threads = config.loader_threads(device.startswith("cuda"))
        self.pool = ThreadPoolExecutor(n_threads) if n_threads else None

    def fetch(self, items: Tensor, epoch: int, step: int) -> UInt8[Tensor, "item 3 height width"]:
        """The items' pixels, augmented by a seed of (seed, epoch, step, item)."""
        seeds = [seed_of(self.config.seed, epoch, step, item) for item in items.tolist()]
        return self._read(items, self.augment, seeds)

    def plain(self, items: Tensor) -> UInt8[Tensor, "item 3 height width"]:
        """The items' pixels as at inference."""
        return self._read(items, None, [0] * len(items))

    def view(self, items: Tensor, view: int) -> UInt8[Tensor, "item 3 height width"]:
        """View 0 is the plain image, each other view an augmented one with seeds of its own."""
        if view == 0:
            return self.plain(items)
        return self._read(items, self.augment, [seed_of(self.config.seed, view, item) for item in items.tolist()])

    def _read(self, items: Tensor, augment: TrainingTransform | None, seeds: list[int]) -> Tensor:
        def one(ref_and_seed: tuple) -> Tensor:
            ref, seed = ref_and_seed
            generator = torch.Generator().manual_seed(seed)
            try:
                return read_image(
                    ref, then=self.transform if augment is None else partial(augment, generator=generator)
                )
            except UnreadableImage as error:
                raise BadInput(
                    f"image {ref.id!r} ({ref.path}) could be read before and cannot now: {error.reason}; restore it, "
                    "delete it or remove its row, then start again"
                ) from None

        wanted = list(zip(self.catalogue.images(items.numpy()), seeds, strict=True))
        pixels = torch.stack(list(self.pool.map(one, wanted) if self.pool else map(one, wanted)))
        return pixels.to(self.device)


class EncodedImages:
    """Encodings from block files; a step sees one view of each item, drawn by a seed of (seed, epoch, step)."""

    is_encoded = True

    def __init__(self, folder: Path, n_items: int, config: TrainingConfig) -> None:
        self.config = config
        self.n_items = n_items
        n_blocks = len(sharding.blocks(n_items, config.encode_block))
        self.views = [
            [torch.load(block_path(folder, view, n), mmap=True, weights_only=True) for n in range(n_blocks)]
            for view in range(config.views)
        ]

    def fetch(self, items: Tensor, epoch: int, step: int) -> Tensor:
        """The items' encodings, each from the view that this step draws."""
        encodings = self.view(items, 0)
        if self.config.views == 1:
            return encodings
        # Drawn for all items, so that an item's view does not depend on which others a worker has.
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch, step))
        drawn = torch.randint(self.config.views, (self.n_items,), generator=generator)[items]
        for view in range(1, self.config.views):
            encodings[drawn == view] = self.view(items[drawn == view], view)
        return encodings

    def plain(self, items: Tensor) -> Tensor:
        """The items' encodings as at inference."""
        return self.view(items, 0)

    def view(self, items: Int64[Tensor, " item"], view: int) -> Tensor:
        """One view of the items, in their order."""
        blocks = self.views[view]
        encodings = torch.empty(len(items), *blocks[0].shape[1:], dtype=blocks[0].dtype)
        # An item lies in block `item // size`, at row `item % size`; each block is read once.
        numbers, places = items // self.config.encode_block, items % self.config.encode_block
        for number in numbers.unique().tolist():
            rows = numbers == number
            encodings[rows] = blocks[number][places[rows]]
        return encodings


def block_path(folder: Path, view: int, block: int) -> Path:
    """The file of one block of one view."""
    return folder / f"view-{view:02d}" / f"block-{block:08d}.pt"


@runtime_checkable
class FeatureModel(Protocol):
    """A pairwise model with logit = head((pair features - mean) / std), whose features have no trained parameters."""

    feature_mean: Tensor
    feature_std: Tensor
    head: Any

    def pair_features(self, encoded_query: Tensor, encoded_gallery: Tensor, first_stage_distance: Tensor) -> Tensor:
        """The numbers that describe a pair: [pair, feature]."""
        ...


class CachedPairFeatures:
    """Features of the pairs of candidate lists, by pair; those of other pairs are computed when asked for."""

    is_encoded = True

    def __init__(self, model: FeatureModel, images: EncodedImages, parts: list[CandidateLists]) -> None:
        self.model, self.images = model, images
        # [lists x candidates]: all pairs of all lists, one after the other.
        queries = torch.cat([part.query_items.repeat_interleave(part.items.shape[1]) for part in parts])
        gallery = torch.cat([part.items.flatten() for part in parts])
        distances = torch.cat([part.distances.flatten() for part in parts])
        is_pair = gallery >= 0
        # A pair's key is query x number of items + gallery; sorted, so that `logits` finds it by bisection.
        self.keys, order = self.keys_of(queries[is_pair], gallery[is_pair]).sort()
        self.features = self.compute(queries[is_pair][order], gallery[is_pair][order], distances[is_pair][order])

    def keys_of(self, queries: Int64[Tensor, " pair"], gallery: Int64[Tensor, " pair"]) -> Int64[Tensor, " pair"]:
        """One number for each pair."""
        return queries * self.images.n_items + gallery

    def fetch(self, items: Tensor, epoch: int, step: int) -> Tensor:
        """Nothing: no image is needed."""
        return torch.empty(0)

    def logits(
        self,
        queries: Int64[Tensor, " pair"],
        gallery: Int64[Tensor, " pair"],
        distances: Float[Tensor, " pair"],
    ) -> Float[Tensor, " pair"]:
        """Logits of these pairs by the head as it is now."""
        wanted = self.keys_of(queries, gallery)
        # [pair]: the place of each key; pairs that are not kept find another pair's features, which are replaced.
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        features = self.features[place]
        is_new = self.keys[place] != wanted
        if is_new.any():
            features[is_new] = self.compute(queries[is_new], gallery[is_new], distances[is_new])
        features = features.to(self.model.feature_mean.device)
        return self.model.head((features - self.model.feature_mean) / self.model.feature_std)

    def compute(self, queries: Tensor, gallery: Tensor, distances: Tensor) -> Float[Tensor, "pair feature"]:
        """Features of these pairs, a few at a time."""
        device = self.model.feature_mean.device
        pairs = zip(*(column.split(PAIRS_PER_CALL) for column in (queries, gallery, distances)), strict=True)
        with torch.no_grad():
            parts = [
                self.model.pair_features(
                    self.images.plain(query).to(device),
                    self.images.plain(item).to(device),
                    distance.to(device),
                ).cpu()
                for query, item, distance in pairs
            ]
        return torch.cat(parts)


TrainingImages = DecodedImages | EncodedImages | CachedPairFeatures
