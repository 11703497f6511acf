import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from distributed_rerank.cluster import extraction as on_ray
from distributed_rerank.cluster import fan_out
from distributed_rerank.cluster.executors import RayExecutors
from distributed_rerank.cluster.session import Session
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.work import WorkConfig
from distributed_rerank.data import tables
from distributed_rerank.errors import BadInput
from distributed_rerank.extraction import EmbeddedBlock, ImageBlock, embed
from distributed_rerank.storage.artifacts import read_manifest
from distributed_rerank.storage.begun import ComputedWith
from tests.small_catalogue import EXTRACTOR, make_catalogue

ROOT = Path(__file__).resolve().parents[2]
SessionOf = Callable[[int], Session]

WORK = WorkConfig(images_per_block=3, images_per_batch=2)


@pytest.mark.ray
def test_embed_three_workers_give_the_bytes_of_one_process(session_of: SessionOf, tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 3 * 3 + 1, broken=(4,))
    embed(catalogue, EXTRACTOR, tmp_path / "local", work=replace(WORK, max_rejects=0.1))
    n = 3  # 1, 2 and 3 workers through all stages: tests/jobs/test_same_bytes.py
    executors = RayExecutors(lambda: session_of(n))
    embed(catalogue, EXTRACTOR, tmp_path / str(n), work=replace(WORK, max_rejects=0.1), executors=executors)
    for name in ("embeddings.parquet", "rejects.parquet"):
        assert (tmp_path / str(n) / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    (row,) = tables.read_table(tmp_path / "3" / "rejects.parquet", "rejects").to_pylist()
    assert row["id"] == "picture_004.png"
    assert "not an image" in row["reason"]
    told = read_manifest(tmp_path / str(n))["computed_with"]
    assert told == read_manifest(tmp_path / "local")["computed_with"]
    assert told["precision"] == "float32"


@pytest.mark.ray
def test_embed_begun_by_one_kind_of_worker_is_refused_to_another(
    session_of: SessionOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what the workers tell, whatever the driver has."""
    catalogue = make_catalogue(tmp_path / "images", 9)
    extractor = on_ray.build_extractor(EXTRACTOR)
    extractor.computed_with = lambda device: ComputedWith("cuda", "bfloat16", "bfloat16", "NVIDIA A")

    def dies(
        blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        yield next(on_ray.embed_blocks(lambda: session_of(1), blocks, config, work))
        raise KeyboardInterrupt

    with monkeypatch.context() as other_cluster:
        other_cluster.setattr(on_ray, "build_extractor", lambda config: extractor)
        with pytest.raises(KeyboardInterrupt):
            embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK, executors=SimpleNamespace(embed_blocks=dies))
    with pytest.raises(BadInput, match=r"precision=bfloat16 on cuda, a worker of this run .* precision=float32 on cpu"):
        embed(catalogue, EXTRACTOR, tmp_path / "out", work=WORK, executors=RayExecutors(lambda: session_of(2)))


@pytest.mark.ray
def test_embed_interrupted_on_ray_continues_to_the_same_bytes(session_of: SessionOf, tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path / "images", 13)
    embed(catalogue, EXTRACTOR, tmp_path / "local", work=WORK)

    def dies(
        blocks: list[ImageBlock], config: ExtractorConfig, work: WorkConfig
    ) -> Iterator[tuple[int, EmbeddedBlock]]:
        for done, result in enumerate(on_ray.embed_blocks(lambda: session_of(1), blocks, config, work)):
            if done == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        embed(catalogue, EXTRACTOR, tmp_path / "killed", work=WORK, executors=SimpleNamespace(embed_blocks=dies))
    embed(catalogue, EXTRACTOR, tmp_path / "killed", work=WORK, executors=RayExecutors(lambda: session_of(2)))
    killed, local = (tmp_path / name / "embeddings.parquet" for name in ("killed", "local"))
    assert killed.read_bytes() == local.read_bytes()
    assert read_manifest(tmp_path / "killed")["blocks"]["reused"] == 2 * 2


@pytest.mark.ray
def test_embed_in_a_precision_that_workers_lack_is_one_line(
    session_of: SessionOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's refusal reaches the driver as it was raised there, whatever this machine's CPU can do."""
    extractor = on_ray.build_extractor(EXTRACTOR)

    def refuse(device: object) -> None:
        raise BadInput("precision=bf16 is only emulated here; use auto or fp32")

    extractor.prepare_for_inference = refuse  # travels to the worker with the extractor
    monkeypatch.setattr(on_ray, "build_extractor", lambda config: extractor)
    executors = RayExecutors(lambda: session_of(1))
    with pytest.raises(BadInput, match=r"^precision=bf16 is only emulated here; use auto or fp32$"):
        embed(make_catalogue(tmp_path, 2), EXTRACTOR, tmp_path / "out", work=WORK, executors=executors)


@pytest.mark.ray
def test_embed_survives_the_death_of_a_worker_process(
    session_of: SessionOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make_catalogue(tmp_path / "images", 7)
    embed(catalogue, EXTRACTOR, tmp_path / "local", work=WORK)
    extractor, healthy = on_ray.build_extractor(EXTRACTOR), on_ray.build_extractor(EXTRACTOR)
    mark = tmp_path / "died"

    def die_once(device: str) -> object:
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return healthy.prepare_for_inference(device)

    extractor.prepare_for_inference = die_once
    monkeypatch.setattr(on_ray, "build_extractor", lambda config: extractor)
    embed(catalogue, EXTRACTOR, tmp_path / "ray", work=WORK, executors=RayExecutors(lambda: session_of(2)))
    assert mark.exists()
    name = "embeddings.parquet"
    assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


ON_GPU_WORKERS = """
import sys, tempfile
from functools import partial
from pathlib import Path
import ray
from distributed_rerank.cluster.executors import RayExecutors
from distributed_rerank.cluster.session import Session
from distributed_rerank.extraction import embed
from tests.cluster.test_extraction import EXTRACTOR, WORK, make_catalogue

with tempfile.TemporaryDirectory(prefix="rerank-", dir="/tmp", ignore_cleanup_errors=True) as folder:
    ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, _temp_dir=folder)
    session = Session(num_workers=1, num_cpus=3, use_gpu=True)
    catalogue = make_catalogue(Path(sys.argv[1]) / "images", 7)
    embed(catalogue, EXTRACTOR, Path(sys.argv[1]) / "ray", work=WORK, executors=RayExecutors(lambda: session))
    ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_embed_by_actors_that_hold_a_declared_gpu_gives_the_bytes_of_one_process(tmp_path: Path) -> None:
    """Ray hands out GPUs by their declared number; the actors compute on what there is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", ON_GPU_WORKERS, str(tmp_path)], env=environment, check=True, timeout=240)
    embed(make_catalogue(tmp_path / "images", 7), EXTRACTOR, tmp_path / "local", work=WORK)
    name = "embeddings.parquet"
    assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize(
    ("session", "sizes"),
    [
        (Session(num_workers=2, num_cpus=8, decode_workers=2, use_gpu=True), (2, 2)),
        (Session(num_workers=4, num_cpus=64, decode_workers=64, use_gpu=True), (4, 60)),
        (Session(num_workers=4, num_cpus=16, cpus_per_worker=3, decode_workers=16, use_gpu=True), (4, 4)),
    ],
)
def test_pool_sizes_always_leave_a_cpu_for_decoding(session: Session, sizes: tuple[int, int]) -> None:
    embedders, decoders = on_ray.pool_sizes(session, n_blocks=1000)
    assert (embedders, decoders) == sizes
    assert embedders * session.cpus_per_worker + decoders <= session.num_cpus


@pytest.mark.parametrize(
    "session",
    [
        Session(num_workers=1, num_cpus=1, use_gpu=True),
        Session(num_workers=4, num_cpus=16, cpus_per_worker=4, use_gpu=True),
    ],
)
def test_pool_sizes_without_a_cpu_for_decoding_are_bad_input(session: Session) -> None:
    with pytest.raises(BadInput, match="leave none"):
        on_ray.pool_sizes(session, n_blocks=1)


@pytest.mark.parametrize(("n_blocks", "sizes"), [(1, (1, 1)), (2, (2, 2)), (3, (3, 3)), (7, (6, 4))])
def test_pool_sizes_are_never_more_than_the_blocks(n_blocks: int, sizes: tuple[int, int]) -> None:
    assert on_ray.pool_sizes(Session(num_workers=6, num_cpus=12, decode_workers=4), n_blocks) == sizes


@pytest.mark.ray
def test_embed_goes_on_where_a_worker_is_stopped(
    session_of: SessionOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stopped process tells nobody; the time it may take is that of the other blocks."""
    monkeypatch.setattr(fan_out, "_LEAST_S", 5.0)
    monkeypatch.setattr(fan_out, "_FIRST_S", 20.0)
    catalogue = make_catalogue(tmp_path / "images", 13)
    embed(catalogue, EXTRACTOR, tmp_path / "local", work=WORK)
    extractor, healthy = on_ray.build_extractor(EXTRACTOR), on_ray.build_extractor(EXTRACTOR)
    mark = tmp_path / "stopped"

    def stop_once(device: str) -> object:
        if not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return healthy.prepare_for_inference(device)

    extractor.prepare_for_inference = stop_once
    monkeypatch.setattr(on_ray, "build_extractor", lambda config: extractor)
    try:
        embed(catalogue, EXTRACTOR, tmp_path / "ray", work=WORK, executors=RayExecutors(lambda: session_of(2)))
    finally:
        os.kill(int(mark.read_text()), signal.SIGKILL)
    assert "a worker does not answer" in caplog.text
    name = "embeddings.parquet"
    assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_rows_that_never_come_end_the_wait_and_errors_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out, "_LEAST_S", 0.2)
    closed: list[bool] = []

    def some() -> Iterator[pa.Table]:
        try:
            for number in range(5):
                yield pa.table({"row": [number]})
                if number == 3:
                    time.sleep(1.0)
        finally:
            closed.append(True)

    def fails() -> Iterator[pa.Table]:
        yield pa.table({"row": [0]})
        raise BadInput("as it was raised")

    found = [table["row"][0].as_py() for table in on_ray._in_time(some(), fan_out.Patience())]
    assert found == [0, 1, 2, 3]
    with pytest.raises(BadInput, match=r"^as it was raised$"):
        list(on_ray._in_time(fails(), fan_out.Patience()))
    time.sleep(1.2)
    assert closed, "what is left is closed"
