"""Images to embeddings: blocks of images through one extractor, and the resumable folder they end in. Layer
3.

Which images share a block and a micro-batch is fixed by the catalogue and the config, never by workers or
order of completion, because a network's last bits may depend on what else is in its batch.
"""

import logging
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Float32, Int32, UInt8
from torch import Tensor

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.decoding import decode, readable_ids
from distributed_rerank.data.doubtful_boxes import tell_of_doubtful_boxes
from distributed_rerank.data.embeddings import Embeddings, read_embeddings
from distributed_rerank.data.rejects import Reject, check_rejects, reject_table, rejects_of
from distributed_rerank.data.vectors import LAYOUT, write_vectors
from distributed_rerank.errors import BadInput
from distributed_rerank.models.extractor import Extractor, build_extractor, weights_digest
from distributed_rerank.runtime import logs
from distributed_rerank.runtime.devices import InferenceThreads, pick_device
from distributed_rerank.runtime.gpu import Copier, MicroBatch
from distributed_rerank.runtime.profiling import traced
from distributed_rerank.runtime.progress import progress
from distributed_rerank.storage import artifacts
from distributed_rerank.storage.begun import ComputedWith
from distributed_rerank.storage.manifests import MANIFEST
from distributed_rerank.tensors import sharding

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import

logger = logging.getLogger(__name__)

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
        with traced("embed"):
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
    for number, images in blocks:
        refs = list(images)
        with logs.about(block=number):
            decoded = decode(refs, extractor.transform, threads=threads)
            embeddings = embedder.embed(decoded.pixels)
        ids = [refs[position].id for position in decoded.kept]
        check_finite(ids, embeddings)
        yield number, EmbeddedBlock(ids, embeddings, decoded.rejects, embedder.computed_with)


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
    precision, or damaged (`overwrite` recomputes it), for an embedding that is not finite, and, after all
    images were tried, when more than the share `work.max_rejects` of the catalogue cannot be read.
    """
    out, work = Path(out), work or WorkConfig()
    fingerprint = artifacts.make_fingerprint("embed", config=embedding_settings(config, work))
    if artifacts.recover(out, fingerprint, overwrite):
        overwrite = False
    earlier = read_embeddings(out) if artifacts.is_complete(out, fingerprint, overwrite) else None
    # Rejects are read again once; what this run rejects is not.
    repaired = None
    if earlier is not None:
        done = _done(catalogue, earlier, None)
        repaired = _repaired(catalogue, done)
        if not len(done.missing(repaired)):
            _check(earlier, catalogue, work.max_rejects, out)
            return earlier
    with artifacts.stage(out, fingerprint, overwrite) as staging:
        # Read again: another run may have added images before this one had the lock.
        earlier = read_embeddings(out) if artifacts.is_complete(out, fingerprint, overwrite) else None
        done = _done(catalogue, earlier, staging)
        if repaired is None or len(done.rejects) != len(earlier.rejects if earlier is not None else ()):
            repaired = _repaired(catalogue, done)
        _compute(catalogue.refs(done.missing(repaired)), config, work, staging, executors)
        done = _done(catalogue, earlier, staging)
        lost = done.missing(set())
        assert not len(lost), f"images were lost: {catalogue.ids[lost[:3]]}"
        write_vectors(staging.path / "embeddings.parquet", *_merged(_sources(earlier, staging)))
        tables.write_table(staging.path / "rejects.parquet", reject_table(done.rejects, "embed"), "rejects")
        complete = read_embeddings(staging.path)
        tell_of_no_use(complete)
        _check(complete, catalogue, work.max_rejects, staging.path)
        staging.finish({"n_rejected": len(done.rejects)}, rows=len(complete))
    return read_embeddings(out)


@dataclass(frozen=True)
class _Done:
    """How far a catalogue is embedded."""

    catalogue: Catalogue
    is_embedded: Bool[np.ndarray, " item"]
    rejects: list[Reject]
    """Images that could not be read, also those of earlier catalogues, by id."""

    def missing(self, repaired: Set[str]) -> Int32[np.ndarray, " image"]:
        """Items without an embedding, except those that were rejected and are not `repaired`."""
        is_missing = ~self.is_embedded
        rejected = self.catalogue.ids.places_of([reject.id for reject in self.rejects if reject.id not in repaired])
        is_missing[rejected[rejected >= 0]] = False
        return np.flatnonzero(is_missing).astype(np.int32)


def _done(catalogue: Catalogue, earlier: Embeddings | None, staging: artifacts.Staging | None) -> _Done:
    """What an earlier run has finished, and blocks. An image rejected first and embedded later counts as embedded."""
    blocks = [] if staging is None else _whole_blocks(staging)
    rejects = {} if earlier is None else {reject.id: reject for reject in earlier.rejects}
    ids: list[Iterator[Any]] = [] if earlier is None else [earlier.id_parts()]
    if staging is not None:
        embedded, rejected = staging.blocks("embeddings"), staging.blocks("rejects")
        for number in blocks:
            rejects |= {reject.id: reject for reject in rejects_of(rejected.read(number))}
        ids.append(embedded.read(number, ["id"])["id"] for number in blocks)
    is_embedded = np.zeros(len(catalogue), bool)
    for part in chain.from_iterable(ids):
        places = catalogue.ids.places_of(part)
        is_embedded[places[places >= 0]] = True
        if rejects:
            for id in set(rejects).intersection(part.to_pylist()):
                del rejects[id]
    return _Done(catalogue, is_embedded, [rejects[id] for id in sorted(rejects)])


def _whole_blocks(staging: artifacts.Staging) -> list[int]:
    return sorted(staging.blocks("embeddings").done() & staging.blocks("rejects").done())


def _repaired(catalogue: Catalogue, done: _Done) -> set[str]:
    """Ids of the catalogue's images that were rejected and can be read now."""
    rejected = catalogue.ids.places_of([reject.id for reject in done.rejects])
    return readable_ids(catalogue.images(rejected[rejected >= 0]))


def _sources(earlier: Embeddings | None, staging: artifacts.Staging) -> list[Iterator[pa.Table]]:
    """The embeddings that are there as tables, in sources whose ids ascend: an earlier run's, and those of blocks."""
    store, sources, last = staging.blocks("embeddings"), [], None
    for number in _whole_blocks(staging):
        ids = store.read(number, ["id"])["id"]
        if not len(ids):
            continue
        if last is None or ids[0].as_py() < last:
            sources.append([])
        sources[-1].append(number)
        last = ids[-1].as_py()
    of_blocks: list[Iterator[pa.Table]] = [map(store.read, numbers) for numbers in sources]
    return of_blocks if earlier is None else [earlier.tables(), *of_blocks]


def _merged(sources: Sequence[Iterator[pa.Table]]) -> tuple[int, Iterator[pa.Table]]:
    """The length of an embedding, and the rows of all sources in the order of their ids, as tables."""
    heads = [(table, source) for source in sources if (table := next(source, None)) is not None]
    dim = heads[0][0].schema.field("embedding").type.list_size if heads else 1

    def merge() -> Iterator[pa.Table]:
        nonlocal heads
        while heads:
            # All rows up to the first last id: no later row of any source comes before it.
            limit = min(table["id"][-1].as_py() for table, _ in heads)
            counts = [pc.sum(pc.less_equal(table["id"], limit)).as_py() for table, _ in heads]
            parts = [table[:count] for (table, _), count in zip(heads, counts, strict=True) if count]
            yield parts[0] if len(parts) == 1 else pa.concat_tables(parts).sort_by("id")
            rest = [(table[count:], source) for (table, source), count in zip(heads, counts, strict=True)]
            heads = [
                (found, source)
                for table, source in rest
                if (found := table if len(table) else next(source, None)) is not None
            ]

    return dim, merge()


def check_finite(ids: Sequence[str], embeddings: Float32[np.ndarray, "image dim"]) -> None:
    """Raises BadInput, naming the first image, where an embedding of a block is not finite."""
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise BadInput(
            f"the extractor gives no finite embedding of image {ids[bad[0]]!r} ({len(bad)} of {len(ids)} images of its "
            "block); check its weights, or give --extractor-precision fp32"
        )


def tell_of_no_use(embeddings: Embeddings) -> None:
    """Warn of embeddings that are zero, and of images that all have the same one."""
    n_zero, first, start, is_same = 0, 0, 0, len(embeddings) > 1
    for block in embeddings.blocks():
        is_zero = ~block.any(axis=1)
        first = first if n_zero else start + int(is_zero.argmax())
        n_zero += int(is_zero.sum())
        is_same = is_same and bool((block == embeddings.matrix[:1]).all())
        start += len(block)
    if n_zero:
        logger.warning("%d EMBEDDINGS ARE ZERO, first that of %r", n_zero, embeddings.ids[first])
    elif is_same:
        logger.warning("ALL %d IMAGES HAVE THE SAME EMBEDDING: check the extractor's weights", len(embeddings))


def embedding_settings(config: ExtractorConfig, work: WorkConfig) -> dict[str, Any]:
    """All settings that can change an embedding; weights by their content."""
    return {"extractor": asdict(config) | {"weights": weights_digest(config)}, **work.fingerprint_settings("embed")}


def _compute(
    refs: Sequence[ImageRef],
    config: ExtractorConfig,
    work: WorkConfig,
    staging: artifacts.Staging,
    executors: EmbedExecutors | None,
) -> None:
    """Embed `refs` and store their blocks; the rejects go first, so that a stored block is a complete one."""
    if not len(refs):
        return
    tell_of_doubtful_boxes(refs)
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
        embedded.write(number, tables.embeddings_table(result.ids, result.embeddings), **LAYOUT)
    assert not blocks, f"blocks {sorted(blocks)} never came back"


def _check(embeddings: Embeddings, catalogue: Catalogue, max_rejects: float | None, folder: Path) -> None:
    rejects = embeddings.rejects_among(catalogue.ids)
    check_rejects(rejects, len(catalogue), max_rejects, str(folder / "rejects.parquet"))


def check_complete(embeddings: Embeddings, catalogue: Catalogue, max_rejects: float | None, source: Path) -> Embeddings:
    """The embeddings, as they were read from `source`.

    A table of others is told of as `tell_of_no_use` says. Raises BadInput for images of the catalogue that have neither
    an embedding nor a reject row, and for too many rejects.
    """
    if isinstance(embeddings.matrix, np.ndarray):  # those on disk are of `embed`, which has told it
        tell_of_no_use(embeddings)
    known = {reject.id for reject in embeddings.rejects}
    missing = [id for id in catalogue.ids[embeddings.rows_of(catalogue.ids) < 0] if id not in known]
    if missing:
        raise BadInput(
            f"{len(missing)} of {len(catalogue)} images have no embedding in {source}, first {missing[0]!r}; "
            "embed this catalogue (`embed`) or give another --embeddings"
        )
    _check(embeddings, catalogue, max_rejects, source)
    return embeddings


def embeddings_of_others(folder: Path) -> Embeddings | None:
    """The table of embeddings at `folder` where it is none that `embed` wrote or may write to; None: it is."""
    has_own = (folder / MANIFEST).is_file() and not tables.is_rewritten(folder)
    is_own = folder.is_dir() and (has_own or not any(folder.glob("*.parquet")))
    return None if is_own or not folder.exists() else read_embeddings(folder)
