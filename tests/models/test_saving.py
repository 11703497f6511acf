import json

import huggingface_hub
import pytest
import safetensors
import torch

from distributed_rerank.chain.chain import Chain, PairwiseStep, write_chain
from distributed_rerank.config.evaluation import RerankerConfig
from distributed_rerank.config.own import refuse_foreign
from distributed_rerank.config.pairwise import (
    ConcatSiameseConfig,
    DistanceSiameseConfig,
    SplitSiameseConfig,
    TokenSiameseConfig,
)
from distributed_rerank.errors import BadInput
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.saving import load_model, save_extractor, save_model
from distributed_rerank.models.split_siamese import SplitSiamese
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.reranking.loading import load_model_and_chain


@pytest.fixture
def saved(tmp_path, vit_config):
    return save_model(DistanceSiamese(DistanceSiameseConfig(extractor=vit_config)), tmp_path / "model")


@pytest.mark.parametrize("name", ["concat", "distance", "split", "token"])
def test_load_model_gives_the_same_logits_and_config(tmp_path, vit_config, pixels, name):
    build = {
        "concat": lambda: ConcatSiamese(
            ConcatSiameseConfig(extractor=vit_config, hidden_dims=(8, 4), both_orders=True)
        ),
        "distance": lambda: DistanceSiamese(DistanceSiameseConfig(extractor=vit_config, output_bias=0.5)),
        "split": lambda: SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=2, storage="fp16")),
        "token": lambda: TokenSiamese(
            TokenSiameseConfig(extractor=vit_config, depths=(0, -1), grid=3, token_storage="int8")
        ),
    }[name]
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    loaded = load_model(save_model(model, tmp_path / "deep" / "model"))
    assert type(loaded) is type(model)
    assert loaded.transform == model.transform
    assert loaded.config.extractor.weights == "none"
    assert not loaded.training
    with torch.inference_mode():
        a, b = model.encode(pixels), loaded.encode(pixels)
        assert torch.equal(a, b)
        assert torch.equal(model(a[:3], a[3:], torch.ones(3)), loaded(b[:3], b[3:], torch.ones(3)))
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_load_model_needs_no_weights_file_of_the_extractor(tmp_path, vit_config, pixels):
    first = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config))
    torch.save(first.state_dict(), tmp_path / "start.pth")
    model = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, pairwise_weights=str(tmp_path / "start.pth")))
    save_model(model, tmp_path / "model")
    (tmp_path / "start.pth").unlink()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.head[0].weight, first.head[0].weight)


def test_save_model_twice_replaces_the_files(saved, vit_config):
    save_model(DistanceSiamese(DistanceSiameseConfig(extractor=vit_config, output_bias=2.0)), saved)
    assert load_model(saved).config.output_bias == 2.0


def test_saved_extractor_has_the_same_bytes_each_time(tmp_path, vit_config):
    """The library writes two entries of metadata in an order of chance."""
    extractor = DistanceSiamese(DistanceSiameseConfig(extractor=vit_config)).extractor
    files = [save_extractor(extractor, tmp_path / f"{number}.safetensors", {"b", "a"}) for number in range(16)]
    assert len({file.read_bytes() for file in files}) == 1
    with safetensors.safe_open(files[0], "pt") as content:
        assert content.metadata() == {"format": "pt", "seen_labels": "a b"}
        assert set(content.keys()) == set(extractor.model.state_dict())
        for name, value in extractor.model.state_dict().items():
            assert torch.equal(content.get_tensor(name), value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_load_model_missing_file_is_refused_by_name(saved, missing):
    (saved / missing).unlink()
    with pytest.raises(BadInput, match=f"is no saved pairwise model: it has no {missing}"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "has another schema_version"),
        ({"model": "bert"}, "names the model 'bert'; known are concat, split, token, distance"),
        ({"config": {"colour": 1}}, "unknown field 'colour'"),
    ],
)
def test_load_model_config_of_something_else_is_refused(saved, change, message):
    content = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(BadInput, match=message):
        load_model(saved)


def test_load_model_config_that_is_no_json_is_refused(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(BadInput, match="is not JSON"):
        load_model(saved)


def test_load_model_weights_of_another_config_are_refused(saved):
    content = json.loads((saved / "config.json").read_text())
    content["config"]["linear"] = False
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"1 unexpected \(proj\.weight\)"):
        load_model(saved)


def test_load_model_unreachable_hub_id_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="hf-hub:nobody/nothing could not be fetched"):
        load_model("hf-hub:nobody/nothing")


def test_load_model_of_a_hub_id_reads_the_copy_at_hand_with_its_chain(saved, tmp_path, monkeypatch):
    write_chain(Chain((PairwiseStep(top_n=7),)), saved)
    repository = tmp_path / "hub" / "models--me--shoes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, chain = load_model_and_chain(RerankerConfig(model="hf-hub:me/shoes", allow_hub=True))
    assert isinstance(model, DistanceSiamese)
    assert chain.pairwise == PairwiseStep(top_n=7)


@pytest.mark.parametrize(
    "name",
    ["os:system", "subprocess:run", "torch.hub:load", "builtins:eval", "distributed_rerank.storage.files:write_bytes"],
)
def test_model_folder_that_names_code_of_python_or_of_a_package_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="is no module of your own"):
        refuse_foreign(name, "config.json")
    refuse_foreign("no_such_module_anywhere:Model", "config.json")  # `load_own` says that it cannot be imported
