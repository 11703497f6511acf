"""A model folder that somebody else has made: it runs no code, reads no other file and asks no network."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_catalogue import distance_model

from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.extractor import build_extractor, known_arguments
from distributed_rerank.models.saving import load_model, save_model
from distributed_rerank.reranking.loading import load_model_and_chain


class _Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A checkpoint that leaves the file `trace` behind if anybody unpickles it."""
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(_Runs(tmp_path / "trace")))
    torch.save({"state_dict": _Runs(tmp_path / "trace")}, tmp_path / "trap.bin")
    return tmp_path


def changed_folder(folder: Path, **extractor: Any) -> Path:
    save_model(distance_model(), folder)
    content = json.loads((folder / "config.json").read_text())
    content["config"]["extractor"] |= extractor
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("file", ["trap.pth", "trap.bin"])
@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay", "pretrained_cfg"])
def test_folder_cannot_name_a_checkpoint_to_load(name: str, file: str, trap: Path) -> None:
    path = str(trap / file)
    value = path if name == "checkpoint_path" else {"file": path}
    args = {name: value} if name == "checkpoint_path" else {name: value, "pretrained": True}
    with pytest.raises(BadInput, match=f"takes no argument {name}|takes no argument pretrained"):
        load_model(changed_folder(trap / "model", args=args))
    assert not (trap / "trace").exists()


def test_command_line_cannot_either(trap: Path) -> None:
    config = ExtractorConfig(name="resnet10t", weights="none", args={"checkpoint_path": str(trap / "trap.pth")})
    with pytest.raises(BadInput, match="takes no argument checkpoint_path"):
        build_extractor(config)
    for file in ("trap.pth", "trap.bin"):
        with pytest.raises(BadInput):
            build_extractor(ExtractorConfig(name="resnet10t", weights=str(trap / file)))
    assert not (trap / "trace").exists()


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/tmp", "no_such_network", 7])
def test_folder_names_a_network_of_timm_and_no_place(name: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a place was asked")

    folder = changed_folder(tmp_path / "model", name=name)
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(BadInput, match="which is no timm model"):
        load_model(folder)


@pytest.mark.parametrize("name", ["os:system", "torch:load", "distributed_rerank.errors:BadInput"])
def test_folder_names_no_code_of_installed_packages(name: str, tmp_path: Path) -> None:
    words = f"config.json names {name}, which is no module of your own"
    with pytest.raises(BadInput, match=words):
        load_model(changed_folder(tmp_path / "extractor", name=name))
    folder = changed_folder(tmp_path / "model")
    content = json.loads((folder / "config.json").read_text()) | {"model": name}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=words):
        load_model(folder)


def test_folder_takes_plain_values_only(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="takes no argument __class__"):
        load_model(changed_folder(tmp_path / "model", args={"__class__": "x"}))
    with pytest.raises(BadInput, match="must be a number, a word"):
        build_extractor(ExtractorConfig(name="resnet10t", weights="none", args={"act_layer": torch.nn.ReLU}))


def test_hub_is_asked_only_with_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(BadInput, match="allow it with --allow-hub"):
        load_model_and_chain(RerankerConfig(model="hf-hub:owner/name"))


def test_arguments_that_load_something_are_no_settings_of_any_network() -> None:
    everything = known_arguments("hf-hub:any/name")
    loading = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    assert not loading & everything
    assert {"depth", "embed_dim", "pad_type", "norm_layer", "global_pool", "img_size"} <= everything
    assert "depth" in known_arguments("vit_small_patch16_224.dino")


def test_class_of_a_later_timm_that_loads_something_is_given_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading(torch.nn.Module):
        def __init__(self, checkpoint_path: str, width: int) -> None: ...

    Loading.__module__ = "timm.models.resnet"
    monkeypatch.setattr(timm.models.resnet, "Loading", Loading, raising=False)
    found = known_arguments.__wrapped__("resnet10t")
    assert "width" in found
    assert "checkpoint_path" not in found
