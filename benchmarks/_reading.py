"""What reading a catalogue's table takes beside the table itself, in a process of its own; no image is opened.

python benchmarks/_reading.py '{"n_images": 1000000, "form": "parquet", "order": "shuffled", "columns": "all"}'
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import distributed_rerank  # noqa: F401  (first, as in a job: it chooses Arrow's allocator)

# isort: split
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from distributed_rerank.data.catalogue_files import read_catalogue
from distributed_rerank.runtime.memory import give_back_memory

Answer = dict[str, Any]

_ROWS = 1 << 16
_WRITERS = {"csv": pyarrow.csv.CSVWriter, "parquet": pyarrow.parquet.ParquetWriter}


def reading(
    folder: Path, n_images: int, form: str = "csv", order: str = "sorted", columns: str = "few", digest: bool = False
) -> Answer:
    """Bytes an image of the finished table, and of the peak of reading beyond what stays; `form` is csv or parquet.

    `order` of the rows is sorted or shuffled; `columns` are few (no id, no box) or all.
    """
    path = folder / f"df.{form}"
    # By another process, for what it leaves free would hide what reading takes.
    writer = get_context("spawn").Process(target=write_images, args=(path, n_images, order, columns))
    writer.start()
    writer.join()
    assert not writer.exitcode, "the table was not written"
    answer: Answer = {}
    before = memory_mb("VmRSS")
    with staged(answer, "read"):
        catalogue = read_catalogue(str(path), purpose="evaluation")
    gc.collect()
    give_back_memory()
    held, table = memory_mb("VmRSS"), table_mb(catalogue.table)
    if digest:
        answer["digest"] = catalogue.digest()
    each = {"table": table, "held": held - before, "beyond": answer["read_mb"] - held}
    return answer | {f"{name}_bytes": round(value * 1e6 / n_images, 1) for name, value in each.items()}


def write_images(path: Path, n_images: int, order: str, columns: str) -> None:
    """A table of images that are not there, eight of a label."""
    batches = (_rows(start, min(start + _ROWS, n_images), n_images, order, columns) for start in
               range(0, n_images, _ROWS))  # fmt: skip
    first = next(batches)
    with _WRITERS[path.suffix[1:]](path, first.schema) as file:
        file.write_table(first)
        for batch in batches:
            file.write_table(batch)


def _rows(start: int, stop: int, n_images: int, order: str, columns: str) -> pa.Table:
    number = np.arange(start, stop)
    if order == "shuffled":
        number = number * 1_000_003 % n_images  # a prime: no number comes twice
    cells: dict[str, Any] = {"path": [f"images/{at:08d}.jpg" for at in number], "label": number // 8}
    cells |= {"split": ["validation"] * len(number), "is_query": number % max(1, n_images // 1000) == 0}
    cells["is_gallery"] = np.ones(len(number), bool)
    if columns == "all":
        cells |= {"id": [f"{at:012d}" for at in number], "category": [f"kind {at % 50}" for at in number]}
        cells |= {"sequence": number // 4, "item": [f"thing {at // 8}" for at in number]}
        cells |= {"x_1": number % 7, "y_1": number % 5, "x_2": number % 7 + 200.5, "y_2": number % 5 + 100}
    return pa.table(cells)


@contextmanager
def staged(answer: Answer, name: str) -> Iterator[None]:
    """Seconds of a stage, and the most memory that this process held in it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started = time.perf_counter()
    yield
    answer |= {f"{name}_s": time.perf_counter() - started, f"{name}_mb": memory_mb("VmHWM")}


def memory_mb(field: str) -> float:
    """VmRSS, what this process holds, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def table_mb(table: pd.DataFrame) -> float:
    """MB of a table's columns; memory that they share counts once, as `id` and `written_path` often do."""
    sizes: dict[Any, int] = {}
    for name in table:
        if isinstance(table[name].dtype, np.dtype):
            sizes[name] = table[name].to_numpy().nbytes
            continue
        column = pa.array(table[name], from_pandas=True)
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            buffers = [*chunk.buffers(), *(chunk.dictionary.buffers() if pa.types.is_dictionary(chunk.type) else ())]
            sizes |= {buffer.address: buffer.size for buffer in buffers if buffer is not None}
    return sum(sizes.values()) / 1e6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(reading(Path(work), **json.loads(sys.argv[1]))))
