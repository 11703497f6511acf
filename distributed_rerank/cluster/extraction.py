"""Extraction on Ray Data: on CPUs tasks that decode and embed, on GPUs decoding tasks that feed embedding actors.

A row is a whole block, so that the images of a micro-batch never depend on how Ray Data cuts its own blocks. Pixels
travel as uint8. Our own operators read the images, and not Ray Data's `download`, which swallows the reason of every
failure. The plan comes from the driver's memory and not from a manifest file: nodes and driver need no common folder,
and the stage's own store knows which blocks are finished. Some blocks a worker are one execution of Ray Data, so that
the paths of all images are never written down at once.
"""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from distributed_rerank.cluster.decode_rows import as_binary, decode_row, manifest
from distributed_rerank.cluster.fan_out import Patience, plain_errors
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data.rejects import Reject
from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.extraction import EmbeddedBlock, Embedder, ImageBlock, check_finite
from distributed_rerank.models.extractor import build_extractor
from distributed_rerank.runtime import logs
from distributed_rerank.runtime.devices import tensor_of
from distributed_rerank.storage.begun import ComputedWith

_TRIES = 3
"""Executions in a row without a single block after which the workers, and not one of them, are at fault."""

_BLOCKS_PER_WORKER = 512
"""In one execution of Ray Data: minutes of work, before the next one starts its workers."""

logger = logging.getLogger(__name__)

Decode = Callable[[pa.Table], pa.Table]
_EMBED_ROW: dict[tuple[str, WorkConfig], "_EmbedRow"] = {}
"""What a CPU worker process embeds with, by the extractor's object and the settings."""


def embed_blocks(
    connect: Callable[[], Session], blocks: Sequence[ImageBlock], config: ExtractorConfig, work: WorkConfig
) -> Iterator[tuple[int, EmbeddedBlock]]:
    """The images of these blocks, embedded on Ray Data, blocks as they complete.

    The weights are read once, on the driver. Where no block comes for as long as `fan_out` allows a worker, a worker is
    taken for stopped: what is missing is computed by a new execution, beside the old one. Raises BadInput for GPU
    workers that leave no CPU for decoding, Outage where three executions give nothing.
    """
    extractor = build_extractor(config)  # first: a wrong name or wrong weights must not cost a start of Ray
    session = connect()
    shipped = [ray.put(extractor)]
    decode = functools.partial(
        decode_row, transform=extractor.transform, threads=work.decode_threads or 1, about=logs.now_about()
    )
    on_device = _on_gpus if session.use_gpu else _on_cpus
    missing, patience, tries = dict(blocks), Patience(), 0
    while missing:
        with ray.data.DataContext.current(_data_context()), plain_errors():
            some = list(islice(missing.items(), _BLOCKS_PER_WORKER * session.num_workers))
            rows = ray.data.from_arrow(manifest(some)).repartition(target_num_rows_per_block=1)
            for number, block in _rows(on_device(rows, decode, shipped, work, session, len(some)), patience):
                del missing[number]
                tries = 0
                yield number, block
        is_stuck = any(number in missing for number, _ in some)
        if is_stuck and (tries := tries + 1) == _TRIES:
            raise Outage(f"no embedding block came in {patience.allowed_s():.0f} s, {_TRIES} times; see the workers")
        if is_stuck:
            logger.warning("a worker does not answer; %d blocks are computed again by others", len(missing))


def _on_cpus(
    rows: Any, decode: Decode, extractor: list[ray.ObjectRef], work: WorkConfig, session: Session, n_blocks: int
) -> Any:
    """Tasks that decode and embed: Ray keeps their processes, and so the extractor, for the next blocks."""
    return rows.map_batches(
        functools.partial(_decode_and_embed, decode=decode, extractor=extractor, work=work, about=logs.now_about()),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=session.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(size=min(session.num_workers, n_blocks)),
    )


def _on_gpus(
    rows: Any, decode: Decode, extractor: list[ray.ObjectRef], work: WorkConfig, session: Session, n_blocks: int
) -> Any:
    """Actors that embed, and that free their GPU's memory at the end; tasks on the CPUs decode for them."""
    embedders, decoders = pool_sizes(session, n_blocks)
    decoded = rows.map_batches(
        decode,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=decoders),
    )
    # Without this operator Ray Data may fuse both sides, and the embedding actors would decode.
    return decoded.repartition(target_num_rows_per_block=1).map_batches(
        _EmbedRow,
        fn_constructor_kwargs={"extractor": extractor, "work": work, "about": logs.now_about()},
        batch_size=1,
        batch_format="pyarrow",
        # One CPU is what Ray takes beside a GPU; saying so makes it warn.
        num_cpus=None if session.cpus_per_worker == 1 else session.cpus_per_worker,
        num_gpus=1,
        compute=ray.data.ActorPoolStrategy(size=embedders),
    )


def pool_sizes(session: Session, n_blocks: int) -> tuple[int, int]:
    """The numbers of embedding actors and of decoding tasks at a time, such that decoding always finds a CPU.

    Ray Data hangs without a word if actors hold every CPU. There are never more processes than blocks: they would start
    for nothing, and Ray Data would warn of them. Raises BadInput if the embedding actors leave no CPU.
    """
    free = session.num_cpus - session.num_workers * session.cpus_per_worker
    if free < 1:
        raise BadInput(
            f"{session.num_workers} embedding workers with cpus_per_worker={session.cpus_per_worker} leave none of the "
            f"{session.num_cpus} CPUs for decoding; lower num_workers or cpus_per_worker"
        )
    return min(session.num_workers, n_blocks), min(session.decode_workers, free, n_blocks)


class _EmbedRow:
    """An Embedder as Ray Data wants it: it takes one row, a decoded block, and returns its embeddings.

    A BadInput is returned as its message: raised, Ray Data would log its trace and count it as an actor that died.
    """

    def __init__(self, extractor: list[ray.ObjectRef], work: WorkConfig, about: dict[str, Any]) -> None:
        logs.configure_worker()
        self._about, self._refusal, self._computed_with = about, "", "{}"
        try:
            self._embedder = Embedder(ray.get(extractor[0]), work)
            self._computed_with = json.dumps(dataclasses.asdict(self._embedder.computed_with))
        except BadInput as error:
            self._refusal = str(error)

    def __call__(self, row: pa.Table) -> pa.Table:
        refusal, embeddings = self._refusal, np.empty((0, 0), np.float32)
        if not refusal:
            shape = row["shape"][0].as_py()
            pixels = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(shape)
            with logs.about(**self._about, block=row["block"][0].as_py()):
                embeddings = self._embedder.embed(tensor_of(pixels))
            try:
                check_finite(row["ids"][0].as_py(), embeddings)
            except BadInput as error:
                refusal = str(error)
        columns = {name: row[name] for name in ("block", "ids", "rejects")}
        columns |= {"refusal": [refusal], "computed_with": [self._computed_with]}
        return pa.table({**columns, "shape": [list(embeddings.shape)], "embeddings": as_binary(embeddings)})


def _decode_and_embed(
    row: pa.Table, *, decode: Decode, extractor: list[ray.ObjectRef], work: WorkConfig, about: dict[str, Any]
) -> pa.Table:
    """Both halves in one task; the process keeps the extractor of the last call."""
    key = (extractor[0].hex(), work)
    if key not in _EMBED_ROW:
        _EMBED_ROW.clear()
        _EMBED_ROW[key] = _EmbedRow(extractor, work, about)
    return _EMBED_ROW[key](decode(row))


def _rows(dataset: Any, patience: Patience) -> Iterator[tuple[int, EmbeddedBlock]]:
    """The rows until the last one, or until none comes for longer than the patience allows."""
    for table in _in_time(dataset.iter_batches(batch_size=None, batch_format="pyarrow"), patience):
        for at in range(len(table)):
            row = table.slice(at, 1)
            if refusal := row["refusal"][0].as_py():
                raise BadInput(refusal)
            shape = row["shape"][0].as_py()
            embeddings = np.frombuffer(row["embeddings"][0].as_buffer(), np.float32).reshape(shape)
            rejects = [Reject(r["id"], r["path"], r["reason"]) for r in row["rejects"][0].as_py()]
            computed_with = ComputedWith(**json.loads(row["computed_with"][0].as_py()))
            yield row["block"][0].as_py(), EmbeddedBlock(row["ids"][0].as_py(), embeddings, rejects, computed_with)


def _in_time(batches: Iterable[pa.Table], patience: Patience) -> Iterator[pa.Table]:
    """These batches, up to the first that is late. Ray Data's iterator has no time limit, so a thread waits for it."""
    came: queue.SimpleQueue[concurrent.futures.Future[pa.Table | None]] = queue.SimpleQueue()
    is_left = threading.Event()

    def wait() -> None:
        own = iter(batches)
        is_over = False
        while not (is_over or is_left.is_set()):
            future: concurrent.futures.Future[pa.Table | None] = concurrent.futures.Future()
            try:
                batch = next(own, None)
                future.set_result(batch)
                is_over = batch is None
            except Exception as error:  # noqa: BLE001  (the reader raises it)
                future.set_exception(error)
                is_over = True
            came.put(future)

    threading.Thread(target=wait, daemon=True).start()
    patience.starts(batches)
    try:
        while (batch := came.get(timeout=patience.allowed_s()).result()) is not None:
            patience.ends(batches)
            yield batch
    except queue.Empty:
        return
    finally:
        is_left.set()


def _data_context() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # the stage shows its own
    context.execution_no_progress_timeout_s = -1  # no limit in seconds; `_in_time` has one that is measured
    return context
