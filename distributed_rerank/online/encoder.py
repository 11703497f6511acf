"""Photos to encodings, kept by id in a cache; what the cache had to give up is made again from its file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from distributed_rerank.data.images import MAX_PIXELS, UnreadableImage
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.online.cache import EncodingCache
from distributed_rerank.online.photos import Photo, photo_of, pixels_of, source_of
from distributed_rerank.runtime.devices import InferenceThreads, array_of
from distributed_rerank.tensors import sharding

_IMAGES_PER_BATCH = 16
_BATCHES_AT_A_TIME = 16

Wanted = tuple[str, Photo, tuple[Any, ...]]
"""Id, photo and source of an image to encode."""


@dataclass(frozen=True)
class Encoding:
    """What the model keeps of one photo; `Reranker.rank` takes it in place of the photo."""

    encoded: Tensor
    """Of the model's `encoding_shape` and `encoding_dtype`, on its device."""
    embedding: Float32[Tensor, " dim"] | None
    """By the model's own extractor, on the CPU; None where the model has none for a single image."""


@dataclass(frozen=True)
class CachedEncodings:
    """Encodings of a list of ids."""

    encoded: Tensor
    """[id, ...], on the CPU; zeros where the image cannot be read."""
    embeddings: Float32[Tensor, "id dim"] | None
    unreadable: frozenset[str]


class Encoder:
    """A prepared model and the cache of its encodings. Any thread may call it."""

    def __init__(
        self, model: PairwiseModel, device: torch.device, identity: dict[str, Any], folder: Path | None, budget: int,
        threads: InferenceThreads, *, shared: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._device, self._threads = model, device, threads
        blank = torch.zeros(1, 3, *model.transform.size, dtype=torch.uint8)
        ((_, embedding),) = threads.map(self._encode, [blank])
        self._dim = 0 if embedding is None else embedding.shape[1]
        self.cache = EncodingCache(folder, identity, model.bytes_per_image + 4 * self._dim, budget, shared=shared)

    def encode(self, photo: Photo, max_pixels: int = MAX_PIXELS) -> Encoding:
        """The encoding of a photo. Raises BadInput if it cannot be read."""
        try:
            pixels = pixels_of(photo, self._model.transform, max_pixels)
        except UnreadableImage as error:
            raise BadInput(f"the photo cannot be read: {error.reason}; give another one") from error
        encoded, embedding = self._encode(pixels[None])
        return Encoding(encoded[0], None if embedding is None else embedding[0])

    def add(self, ids: Iterable[str], photos: Iterable[Photo]) -> dict[str, str]:
        """See `Reranker.add`."""
        rejected: dict[str, str] = {}
        wanted: list[Wanted] = []
        for id, photo in _pairs(ids, photos):
            source, known = source_of(photo), self.cache.entry(id)
            if known is None or known.source != source or (not known.is_cached and known.reason is None):
                wanted.append((id, photo, source))
            elif known.reason is not None:
                rejected[id] = known.reason
            if len(wanted) == _IMAGES_PER_BATCH * _BATCHES_AT_A_TIME:
                rejected |= self._add(wanted)
                wanted = []
        return rejected | self._add(wanted)

    def read(self, ids: Sequence[str], given: Mapping[str, Encoding] = MappingProxyType({})) -> CachedEncodings:
        """The encodings of ids: those `given`, and those that were added.

        Raises BadInput for other ids, and for one that cannot be made again.
        """
        if given:
            return self._read_beside(ids, given)
        rows, absent = self.cache.read(ids)
        contents, unreadable = self._make_again(absent) if absent else ({}, frozenset())
        for row, id in enumerate(ids):
            if id in contents or id in unreadable:
                rows[row] = contents.get(id, 0)
        n_bytes, dtype = self._model.bytes_per_image, self._model.encoding_dtype
        encoded = torch.from_numpy(np.ascontiguousarray(rows[:, :n_bytes])).view(dtype)
        embeddings = torch.from_numpy(np.ascontiguousarray(rows[:, n_bytes:])).view(torch.float32)
        shape = (len(ids), *self._model.encoding_shape)
        return CachedEncodings(encoded.view(shape), embeddings if self._dim else None, unreadable)

    def _read_beside(self, ids: Sequence[str], given: Mapping[str, Encoding]) -> CachedEncodings:
        of_given = [given[id] for id in ids if id in given]
        encoded = torch.stack([encoding.encoded.cpu() for encoding in of_given])
        rows = [encoding.embedding for encoding in of_given if encoding.embedding is not None]
        embeddings, unreadable = torch.stack(rows) if rows else None, frozenset[str]()
        if len(of_given) < len(ids):
            found = self.read([id for id in ids if id not in given])
            # [id]: its row where the given ones come first, then the others.
            order = torch.tensor([id not in given for id in ids]).argsort(stable=True).argsort()
            encoded = torch.cat([encoded, found.encoded])[order]
            unreadable = found.unreadable
            if embeddings is not None and found.embeddings is not None:
                embeddings = torch.cat([embeddings, found.embeddings])[order]
        return CachedEncodings(encoded, embeddings, unreadable)

    def _add(self, wanted: Sequence[Wanted]) -> dict[str, str]:
        blocks = [wanted[start:stop] for start, stop in sharding.blocks(len(wanted), _IMAGES_PER_BATCH)]
        rejected: dict[str, str] = {}
        for contents, reasons in self._threads.map(self._encode_block, blocks):
            self._keep(wanted, contents, reasons)
            rejected |= reasons
        return rejected

    def _make_again(self, ids: Sequence[str]) -> tuple[dict[str, np.ndarray], frozenset[str]]:
        """The bytes of ids that the cache has given up, from their files; and those that cannot be read."""
        wanted: list[Wanted] = []
        unreadable: set[str] = set()
        for id in dict.fromkeys(ids):
            entry = self.cache.entry(id)
            if entry is None:
                more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
                raise BadInput(f"candidate {id!r}{more} is not in the cache; call add(ids, images) first")
            photo = photo_of(entry.source)
            if entry.reason is not None:
                unreadable.add(id)
            elif photo is None:
                raise BadInput(
                    f"candidate {id!r} had to make room in the cache, and it came from no file; "
                    "give a larger cache_gb, or add it again"
                )
            else:
                wanted.append((id, photo, entry.source))
        contents: dict[str, np.ndarray] = {}
        # In this thread: `rank` may already be in one of the pool's, whose calls must not wait for each other.
        for start, stop in sharding.blocks(len(wanted), _IMAGES_PER_BATCH):
            found, reasons = self._encode_block(wanted[start:stop])
            self._keep(wanted[start:stop], found, reasons)
            contents |= found
            unreadable |= set(reasons)
        return contents, frozenset(unreadable)

    def _keep(self, wanted: Sequence[Wanted], contents: Mapping[str, np.ndarray], reasons: Mapping[str, str]) -> None:
        for id, _, source in wanted:
            if id in contents:
                self.cache.write(id, source, contents[id])
            elif id in reasons:
                self.cache.reject(id, source, reasons[id])

    def _encode_block(self, wanted: Sequence[Wanted]) -> tuple[dict[str, UInt8[np.ndarray, " slot"]], dict[str, str]]:
        """The bytes for the cache of the readable images, and why the others cannot be read."""
        pixels: dict[str, Tensor] = {}
        reasons: dict[str, str] = {}
        for id, photo, _ in wanted:
            try:
                pixels[id] = pixels_of(photo, self._model.transform)
            except UnreadableImage as error:
                reasons[id] = error.reason
        if not pixels:
            return {}, reasons
        encoded, embeddings = self._encode(torch.stack(list(pixels.values())))
        parts = [array_of(encoded).reshape(len(pixels), -1).view(np.uint8)]
        parts += [] if embeddings is None else [array_of(embeddings).view(np.uint8)]
        return dict(zip(pixels, np.concatenate(parts, axis=1), strict=True)), reasons

    def _encode(self, pixels: UInt8[Tensor, "image 3 height width"]) -> tuple[Tensor, Tensor | None]:
        """Encodings on the device and embeddings on the CPU."""
        encoded, embedding = self._model.encode_and_embed(pixels.to(self._device))
        return encoded, None if embedding is None else embedding.cpu()


def _pairs(ids: Iterable[str], photos: Iterable[Photo]) -> Iterable[tuple[str, Photo]]:
    ids, photos = iter(ids), iter(photos)
    end = object()
    while True:
        id, photo = next(ids, end), next(photos, end)
        if id is end and photo is end:
            return
        if id is end or photo is end:
            raise BadInput("add: there are not as many images as ids; give one image for each id")
        yield str(id), photo  # pyright: ignore[reportReturnType]
