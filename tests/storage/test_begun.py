"""What a folder was begun with: remembered, told, and never mixed."""

from dataclasses import replace
from pathlib import Path

import pytest

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import artifacts, begun
from distributed_rerank.storage.begun import ComputedWith

CPU = ComputedWith("cpu", "bfloat16", "bfloat16")
GPU = ComputedWith("cuda", "bfloat16", "bfloat16", "NVIDIA A")


def test_manifest_tells_device_precision_and_kinds_of_gpu(tmp_path: Path) -> None:
    with artifacts.stage(tmp_path / "out", {"seed": 1}) as staging:
        for gpu in ("NVIDIA B", "NVIDIA A", "NVIDIA B"):
            staging.remember(replace(GPU, gpu=gpu))
        staging.finish()
    assert artifacts.read_manifest(tmp_path / "out")["computed_with"] == {
        "device": "cuda", "precision": "bfloat16", "auto_precision": "bfloat16", "gpus": ["NVIDIA A", "NVIDIA B"],
    }  # fmt: skip
    assert not (tmp_path / "out" / begun.BEGUN).exists()


def test_manifest_of_a_stage_without_workers_tells_the_cpu(tmp_path: Path) -> None:
    with artifacts.stage(tmp_path / "out", {"seed": 1}) as staging:
        staging.finish()
    assert artifacts.read_manifest(tmp_path / "out")["computed_with"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (GPU, "begun with precision=bfloat16 on cpu, a worker of this run computes with precision=bfloat16 on cuda"),
        (replace(CPU, precision="float32"), "begun with precision=bfloat16 on cpu, .* precision=float32 on cpu"),
    ],
)
def test_other_device_or_precision_is_refused_by_name_in_the_same_and_in_a_later_run(
    tmp_path: Path, other: ComputedWith, words: str
) -> None:
    out = tmp_path / "out"
    with artifacts.stage(out, {"seed": 1}) as staging:
        staging.remember(CPU)
        with pytest.raises(BadInput, match=words):
            staging.remember(other)
    with artifacts.stage(out, {"seed": 1}) as again:
        with pytest.raises(BadInput, match=words) as refused:
            again.remember(other)
        assert f"delete {again.path} to begin again" in str(refused.value)
        again.remember(CPU)


def test_run_that_adds_to_a_finished_folder_is_refused_unless_it_overwrites(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with artifacts.stage(out, {"seed": 1}) as staging:
        staging.remember(CPU)
        staging.finish()
    with (
        artifacts.stage(out, {"seed": 1}) as staging,
        pytest.raises(BadInput, match=r"out was made with precision=bfloat16 on cpu.*cuda; pass --overwrite"),
    ):
        staging.remember(GPU)
    with artifacts.stage(out, {"seed": 1}, overwrite=True) as staging:
        staging.remember(GPU)
        staging.finish()
    assert artifacts.read_manifest(out)["computed_with"]["device"] == "cuda"


def test_run_does_not_go_on_elsewhere_between_two_of_its_stages(tmp_path: Path) -> None:
    fp32 = ComputedWith("cpu", "float32")  # asked for: equal wherever it is computed
    with artifacts.stage(tmp_path / "out", {"stage": "evaluate"}) as outer:
        with artifacts.stage(outer.path / "embeddings", {"stage": "embed"}) as inner:
            inner.remember(CPU)
            inner.finish()
        with artifacts.stage(outer.path / "pairs", {"stage": "score"}) as inner:
            with pytest.raises(BadInput, match=r"on cpu, a worker .*cuda; go on where it was begun") as refused:
                inner.remember(GPU)
            assert f"delete {outer.path} to begin again" in str(refused.value)
            with pytest.raises(
                BadInput, match=r"precision=auto \(bfloat16\) on cpu, .*precision=auto \(float32\) on cpu"
            ):
                inner.remember(ComputedWith("cpu", "float32", "float32"))
            inner.remember(fp32)
            inner.finish()
        outer.finish()
    manifest = artifacts.read_manifest(tmp_path / "out")
    assert manifest["computed_with"] == {"device": "cpu", "auto_precision": "bfloat16"}
    assert {name: part["precision"] for name, part in manifest["stages"].items()} == {
        "embeddings": "bfloat16", "pairs": "float32",
    }  # fmt: skip


def test_search_on_another_device_does_not_stop_the_run_around_it(tmp_path: Path) -> None:
    with artifacts.stage(tmp_path / "out", {"stage": "evaluate"}) as outer:
        outer.remember(GPU)
        with artifacts.stage(outer.path / "candidates", {"stage": "retrieve"}) as inner:
            inner.remember(ComputedWith("cpu"))
            with pytest.raises(BadInput, match=r"begun with device=cpu.*device=cuda"):
                inner.remember(ComputedWith("cuda"))


def test_damaged_note_is_bad_input(tmp_path: Path) -> None:
    with artifacts.stage(tmp_path / "out", {"seed": 1}) as staging:
        (staging.path / begun.BEGUN).write_text("{")
        with pytest.raises(BadInput, match=rf"{begun.BEGUN} is damaged.*delete"):
            staging.remember(CPU)
