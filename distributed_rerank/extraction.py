"""Images to embeddings: blocks of images through one extractor, and the resumable folder they end in. Layer
3.

Which images share a block and a micro-batch is fixed by the catalogue and the config, never by workers or
order of completion, because a network's last bits may depend on what else is in its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from torch import Tensor

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import artifacts, tables
from distributed_rerank.data.begun import ComputedWith
from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.decoding import decode, is_readable
from distributed_rerank.data.embeddings import Embeddings, join_embeddings, read_embeddings
from distributed_rerank.data.manifests import MANIFEST
from distributed_rerank.data.rejects import Reject, check_rejects, reject_table, rejects_of
from distributed_rerank.errors import BadInput
from distributed_rerank.models.extractor import Extractor, build_extractor, weights_digest
from distributed_rerank.runtime.devices import InferenceThreads, pick_device
from distributed_rerank.runtime.gpu import Copier, MicroBatch
from distributed_rerank.runtime.progress import progress
from distributed_rerank.tensors import sharding

ImageBlock = tuple[int, Sequence[ImageRef]]
"""Number and images of a block."""


@dataclass(frozen=True)
class EmbeddedBlock:
    """The readable images of a block with their embeddings, and the others."""

    ids: list[str]
    embeddings: Float32[np.ndarray, "image dim"]
    rejects: list[Reject]
    computed_with: ComputedWith


@runtime_checkable
class EmbedExecutors(Protocol):
    """Embed blocks of images, in this process or elsewhere."""

    def embed_blocks(
        self, blocks: Sequence[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        """The embedded blocks by number, in any order."""
        ...


class Embedder:
    """An extractor on the device of this process. A plain class: Ray Data makes its actors from it."""

    def __init__(self, extractor: Extractor, work: WorkConfig) -> None:
        self.device = pick_device()
        self._extractor = extractor.prepare_for_inference(self.device)
        self._threads = InferenceThreads(work.threads_per_worker)
        self._batch = MicroBatch(
            work.images_per_batch or (8 if self.device.type == "cpu" else 256), "--images-per-batch"
        )
        self._to_device = Copier(self.device)
        self.computed_with = self._extractor.computed_with(self.device)

    def embed(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float32[np.ndarray, "image dim"]:
        """Embeddings of a block, in its order, a micro-batch at a time."""

        def embed_rows(rows: slice) -> Float32[np.ndarray, "image dim"]:
            return self._extractor(self._to_device(pixels[rows])).cpu().numpy()

        rows = [slice(*part) for part in sharding.blocks(len(pixels), self._batch.size)]
        parts = self._threads.map(partial(self._batch.run, embed_rows), rows)
        return np.concatenate(
            [np.empty((0, self._extractor.dim), np.float32), *(row for part in parts for row in part)]
        )


def plan(images: Sequence[ImageRef], block_size: int, first_number: int = 0) -> list[ImageBlock]:
    """Cut `images` into numbered blocks of `block_size`; only the last may be shorter."""
    cuts = sharding.blocks(len(images), block_size)
    return [(first_number + number, images[start:stop]) for number, (start, stop) in enumerate(cuts)]


def embed_blocks(
    blocks: Sequence[ImageBlock], config: ExtractorConfig, work: WorkConfig
) -> Iterator[tuple[int, EmbeddedBlock]]:
    """Decode and embed these blocks in this process, one after the other."""
    extractor = build_extractor(config)
    embedder = Embedder(extractor, work)
    threads = work.decode_threads_for(embedder.device.type == "cuda")
    for number, refs in blocks:
        decoded = decode(refs, extractor.transform, threads=threads)
        ids = [refs[position].id for position in decoded.kept]
        yield number, EmbeddedBlock(ids, embedder.embed(decoded.pixels), decoded.rejects, embedder.computed_with)


def embed(
    catalogue: Catalogue,
    config: ExtractorConfig,
    out: str | Path,
    *,
    work: WorkConfig | None = None,
    executors: EmbedExecutors | None = None,
    overwrite: bool = False,
) -> Embeddings:
    """Embeddings of all images of the catalogue, kept in the folder `out`.

    Computed by `executors`, by default in this process. Only images that `out` does not have yet are computed; those of
    an earlier catalogue stay in it. A killed run continues with the next block. Rejected images are tried again once
    they can be read. An explicit id is taken for the same image whatever its path is.

    Raises BadInput for a folder made with another extractor or config, on another kind of device or in another
    precision, or damaged (`overwrite` recomputes it), and, after all images were tried, when more than the share
    `work.max_rejects` of the catalogue cannot be read.
    """
    out, work = Path(out), work or WorkConfig()
    fingerprint = artifacts.make_fingerprint("embed", config=embedding_settings(config, work))
    if artifacts.recover(out, fingerprint, overwrite):
        overwrite = False
    earlier = read_embeddings(out) if artifacts.is_complete(out, fingerprint, overwrite) else None
    if earlier is not None and not _missing(catalogue, earlier):
        _check(earlier, catalogue, work.max_rejects, out)
        return earlier
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        # Read again: another run may have added images before this one had the lock.
        earlier = read_embeddings(out) if artifacts.is_complete(out, fingerprint, overwrite) else None
        done = join_embeddings([earlier, *_staged(staging)])
        _compute(_missing(catalogue, done), config, work, staging, executors)
        complete = join_embeddings([earlier, *_staged(staging)])
        assert not _missing(catalogue, complete), f"images were lost: {_missing(catalogue, complete)[:3]}"
        tables.write_embeddings(staging.path / "embeddings.parquet", complete.ids, complete.matrix)
        rejects = reject_table(complete.rejects, "embed")
        tables.write_table(staging.path / "rejects.parquet", rejects, "rejects")
        _check(complete, catalogue, work.max_rejects, staging.path)
        staging.finish({"n_rejected": len(complete.rejects)}, rows=len(complete.ids))
    return complete


def _missing(catalogue: Catalogue, done: Embeddings) -> list[ImageRef]:
    """Images without an embedding, except those that were rejected and still cannot be read."""
    rejected = {reject.id for reject in done.rejects}
    refs = catalogue.images(np.flatnonzero(done.rows_of(catalogue.ids) < 0))
    return [ref for ref in refs if ref.id not in rejected or is_readable(ref)]


def embedding_settings(config: ExtractorConfig, work: WorkConfig) -> dict[str, Any]:
    """All settings that can change an embedding; weights by their content."""
    return {"extractor": asdict(config) | {"weights": weights_digest(config)}, **work.fingerprint_settings("embed")}


def _compute(
    refs: list[ImageRef],
    config: ExtractorConfig,
    work: WorkConfig,
    staging: artifacts.Staging,
    executors: EmbedExecutors | None,
) -> None:
    """Embed `refs` and store their blocks; the rejects go first, so that a stored block is a complete one."""
    if not refs:
        return
    embedded, rejected = staging.blocks("embeddings"), staging.blocks("rejects")
    blocks = dict(plan(refs, work.images_per_block, max(embedded.done() | rejected.done(), default=-1) + 1))
    embed = embed_blocks if executors is None else executors.embed_blocks
    results = embed(list(blocks.items()), config, work)
    for number, result in progress(results, total=len(blocks), title="embedding"):
        expected = sorted(ref.id for ref in blocks.pop(number))
        found = sorted([*result.ids, *(reject.id for reject in result.rejects)])
        assert found == expected, f"block {number} came back with other images"
        staging.remember(result.computed_with)
        rejected.write(number, reject_table(result.rejects, "embed"))
        ids = np.array(result.ids, dtype=object)
        embedded.write(number, tables.embeddings_table(ids, result.embeddings))
    assert not blocks, f"blocks {sorted(blocks)} never came back"


def _staged(staging: artifacts.Staging) -> Iterator[Embeddings]:
    embedded, rejected = staging.blocks("embeddings"), staging.blocks("rejects")
    for number in sorted(embedded.done() & rejected.done()):
        table = embedded.read(number)
        column = table["embedding"].combine_chunks()
        matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        yield Embeddings(table["id"].to_numpy(), matrix, tuple(rejects_of(rejected.read(number))))


def _check(embeddings: Embeddings, catalogue: Catalogue, max_rejects: float, folder: Path) -> None:
    rejects = embeddings.rejects_among(catalogue.ids)
    check_rejects(rejects, len(catalogue), max_rejects, str(folder / "rejects.parquet"))


def check_complete(embeddings: Embeddings, catalogue: Catalogue, max_rejects: float, source: Path) -> Embeddings:
    """The embeddings, as they were read from `source`.

    Raises BadInput for images of the catalogue that have neither an embedding nor a reject row, and for too many
    rejects.
    """
    known = {reject.id for reject in embeddings.rejects}
    missing = [id for id in catalogue.ids[embeddings.rows_of(catalogue.ids) < 0] if id not in known]
    if missing:
        raise BadInput(
            f"{len(missing)} of {len(catalogue)} images have no embedding in {source}, first {missing[0]!r}; "
            "embed this catalogue (jobs/embed.py) or give another --embeddings"
        )
    _check(embeddings, catalogue, max_rejects, source)
    return embeddings


def embeddings_of_others(folder: Path) -> Embeddings | None:
    """The table of embeddings at `folder` where it is none that `embed` wrote or may write to; None: it is."""
    is_own = folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.glob("*.parquet")))
    return None if is_own or not folder.exists() else read_embeddings(folder)
