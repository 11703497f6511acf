import dataclasses
import hashlib
import json
import time

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from distributed_rerank.config.extractor import ExtractorConfig, parse_named_values
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import BadInput
from distributed_rerank.models import extractor as extractor_module
from distributed_rerank.models import precision as precision_module
from distributed_rerank.models import vit
from distributed_rerank.models.extractor import build_extractor, weights_digest
from distributed_rerank.storage import locations

CPU = torch.device("cpu")


def test_extractor_vit_at_its_own_size_equals_timm(pixels):
    args = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
    config = ExtractorConfig(name="vit_small_patch16_224", weights="none", args=args, normalise=False, precision="fp32")
    extractor = build_extractor(config)
    assert extractor.transform.size == (64, 64)
    with torch.inference_mode():
        expected = extractor.model((pixels / 255 - extractor.mean) / extractor.std)
        torch.testing.assert_close(extractor(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("args", [{"reg_tokens": 4, "no_embed_class": True}, {"init_values": 1e-1, "qk_norm": True}])
def test_extractor_vit_variants_equal_timm(pixels, args):
    args = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64, **args}
    extractor = build_extractor(
        ExtractorConfig(name="vit_small_patch16_224", weights="none", args=args, normalise=False, precision="fp32")
    )
    assert extractor.is_plain_vit
    with torch.inference_mode():
        expected = extractor.model(extractor.normalise_pixels(pixels))
        torch.testing.assert_close(extractor(pixels), expected, rtol=0, atol=1e-5)


def test_extractor_cnn_equals_timm_and_normalises(pixels, cnn_config):
    extractor = build_extractor(cnn_config)
    with torch.inference_mode():
        expected = extractor.model(extractor.normalise_pixels(pixels))
        torch.testing.assert_close(extractor.features(pixels), expected, rtol=1e-4, atol=1e-5)
        embeddings = extractor(pixels)
    assert embeddings.shape == (6, extractor.dim)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_extractor_prepared_for_inference_agrees_with_autocast(pixels, vit_config):
    config = dataclasses.replace(vit_config, precision="auto")
    with torch.inference_mode():
        plain = build_extractor(config)(pixels)
        extractor = build_extractor(config).prepare_for_inference("cpu")
        prepared = extractor(pixels)
        exact = build_extractor(vit_config)(pixels)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, exact, rtol=0, atol=2e-2)
    torch.testing.assert_close(plain, exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_extractor_prepared_for_inference_needs_no_inference_mode(pixels, vit_config, precision):
    extractor = build_extractor(dataclasses.replace(vit_config, precision=precision)).prepare_for_inference("cpu")
    with torch.inference_mode():
        expected = extractor(pixels)
    found = extractor(pixels)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_extractor_prepared_twice_is_the_one_prepared_once(pixels, vit_config, precision):
    extractor = build_extractor(dataclasses.replace(vit_config, precision=precision)).prepare_for_inference("cpu")
    with torch.inference_mode():
        once = extractor(pixels)
        assert torch.equal(extractor.prepare_for_inference("cpu")(pixels), once)


def test_extractor_prepared_for_inference_keeps_no_positions_of_another_size(pixels, vit_config):
    """A model sees single images and pairs one above the other, in turn; both have their own positions."""
    extractor = build_extractor(vit_config).prepare_for_inference("cpu")
    exact = build_extractor(vit_config)
    pairs = torch.cat([pixels, pixels], dim=2)
    with torch.inference_mode():
        for images in (pixels, pairs, pixels):
            torch.testing.assert_close(extractor(images), exact(images), rtol=0, atol=1e-5)


def test_extractor_in_bf16_is_built_where_only_others_compute_in_it(vit_config, cnn_config, pixels, monkeypatch):
    """The head of a cluster may be without the GPUs of its workers."""
    for module in (extractor_module, precision_module, vit):
        monkeypatch.setattr(module, "bf16_support", lambda device: "tensor cores" if device.type == "cuda" else None)
    for config in (vit_config, cnn_config):
        extractor = build_extractor(dataclasses.replace(config, precision="bf16"))
        assert extractor.dtype_on(torch.device("cuda")) == torch.bfloat16
        for compute in (lambda: extractor(pixels), lambda: extractor.prepare_for_inference("cpu")):  # noqa: B023
            with pytest.raises(BadInput, match=r"precision=bf16 is only emulated here .*; use auto or fp32"):
                compute()
        assert {parameter.dtype for parameter in extractor.parameters()} == {torch.float32}


@pytest.mark.parametrize(("size", "stacked", "is_narrow"), [(32, 2, True), (32, 1, False), (64, 2, False)])
def test_extractor_with_maps_of_one_column_and_several_rows_is_float32_on_amx(
    cnn_config, monkeypatch, size, stacked, is_narrow
):
    config = dataclasses.replace(cnn_config, image_size=size, precision="auto")
    monkeypatch.setattr(precision_module, "bf16_support", lambda device: "AMX")
    extractor = build_extractor(config, stacked)
    assert extractor.has_narrow_maps == is_narrow
    assert (extractor.dtype_on(CPU) == torch.float32) == is_narrow
    dtypes = {parameter.dtype for parameter in extractor.prepare_for_inference("cpu").parameters()}
    assert dtypes == {torch.float32 if is_narrow else torch.bfloat16}
    monkeypatch.setattr(precision_module, "bf16_support", lambda device: "AVX-512 BF16")
    assert build_extractor(config, stacked).dtype_on(CPU) == torch.bfloat16


def test_extractor_in_bf16_with_narrow_maps_on_amx_is_refused(cnn_config, monkeypatch):
    monkeypatch.setattr(precision_module, "bf16_support", lambda device: "AMX")
    config = dataclasses.replace(cnn_config, image_size=32, precision="bf16")
    assert build_extractor(config).dtype_on(CPU) == torch.bfloat16
    stacked = build_extractor(config, stacked=2)
    with pytest.raises(BadInput, match=r"precision=bf16 .* one column .*use auto or fp32, or a larger --image-size"):
        stacked.prepare_for_inference("cpu")


def test_extractor_transform_every_field_can_be_overridden():
    config = ExtractorConfig(
        name="resnet10t",
        weights="none",
        image_size=(48, 32),
        resize="square",
        crop_pct=0.5,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    expected = InferenceTransform(
        size=(48, 32),
        resize="square",
        crop_pct=0.5,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    extractor = build_extractor(config)
    assert extractor.transform == expected
    assert extractor.config == config


def test_extractor_transform_without_overrides_is_timms_data_config():
    extractor = build_extractor(ExtractorConfig(name="mobilenetv2_100", weights="none", resize="crop"))
    data = timm.data.resolve_data_config({}, model=timm.create_model("mobilenetv2_100"))
    assert extractor.transform.size == data["input_size"][1:]
    assert extractor.transform.resize == "crop"
    assert extractor.transform.crop_pct == data["crop_pct"]
    assert extractor.transform.interpolation == data["interpolation"]
    assert extractor.transform.mean == data["mean"]


def test_build_extractor_untrained_is_decided_by_the_seed_and_leaves_global_state(vit_config):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = weights_digest(vit_config), weights_digest(vit_config)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert first != weights_digest(dataclasses.replace(vit_config, extractor_seed=1))


def test_weights_digest_of_a_file_is_its_sha256(tmp_path, cnn_config):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(build_extractor(cnn_config).model.state_dict(), path)
    config = dataclasses.replace(cnn_config, weights=str(path))
    assert weights_digest(config) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "module.", "extractor.model.", "backbone."])
def test_build_extractor_checkpoint_with_wrapper_and_classifier_is_loaded(tmp_path, pixels, cnn_config, prefix, caplog):
    trained = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": {prefix + k: v for k, v in trained.state_dict().items()}}, tmp_path / "w.pth")
    extractor = build_extractor(dataclasses.replace(cnn_config, weights=str(tmp_path / "w.pth"), normalise=False))
    with torch.inference_mode():
        expected = trained.eval().forward_head(
            trained.forward_features(extractor.normalise_pixels(pixels)), pre_logits=True
        )
        torch.testing.assert_close(extractor(pixels), expected, rtol=1e-4, atol=1e-5)
    # found.md A18: whether OML pooled by GeM is in no checkpoint.
    assert ("gem_p" in caplog.text) == (prefix == "extractor.model.")


def test_build_extractor_weights_of_another_architecture_are_refused(tmp_path, cnn_config):
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "other.pth")
    with pytest.raises(BadInput, match=r"other\.pth do not fit the architecture: .* missing \("):
        build_extractor(dataclasses.replace(cnn_config, weights=str(tmp_path / "other.pth")))


def test_build_extractor_unknown_name_suggests_close_ones():
    with pytest.raises(BadInput, match=r"mobilenetv2_10 is not a timm model; did you mean .*mobilenetv2_100"):
        build_extractor(ExtractorConfig(name="mobilenetv2_10", weights="none"))


def test_build_extractor_refused_argument_is_named():
    with pytest.raises(BadInput, match="resnet10t takes no argument depht"):
        build_extractor(ExtractorConfig(name="resnet10t", weights="none", args={"depht": "2"}))


def test_build_extractor_hub_that_does_not_answer_is_told_quickly_and_once(monkeypatch, capfd):
    locations._hub_answers.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(BadInput, match=r"could not be fetched") as told:
        build_extractor(ExtractorConfig(name="test_resnet.r160_in1k"))
    assert time.monotonic() - started < 10
    assert "\n" not in str(told.value)
    assert "retry" not in capfd.readouterr().err.lower()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    locations._hub_answers.cache_clear()


def test_build_extractor_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"could not be fetched .* --extractor-weights FILE .* none"):
        build_extractor(ExtractorConfig(name="resnet10t.c3_in1k"))


def test_build_extractor_network_of_one_size_refuses_another():
    with pytest.raises(BadInput, match=r"mixer_s16_224 does not accept images of 96 x 96 .* --image-size"):
        build_extractor(ExtractorConfig(name="mixer_s16_224", weights="none", image_size=96))


def test_build_extractor_window_transformer_takes_a_stacked_pair():
    config = ExtractorConfig(
        name="swin_tiny_patch4_window7_224", weights="none", args={"depths": (1, 1, 1, 1), "embed_dim": 24}
    )
    extractor = build_extractor(config, stacked=2)
    pair = torch.zeros(1, 3, 448, 224, dtype=torch.uint8)
    assert extractor.features(pair).shape == (1, extractor.dim)


def test_build_extractor_local_dir_is_resolved_to_a_name_that_needs_no_folder(tmp_path, pixels):
    args = {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 64}
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **args)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = {"architecture": "vit_small_patch16_224", "num_classes": 0, "model_args": args}
    described["pretrained_cfg"] = {"input_size": [3, 64, 64], "num_classes": 0, "mean": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(described))
    extractor = build_extractor(ExtractorConfig(name=f"local-dir:{tmp_path}", precision="fp32"))
    assert torch.equal(extractor.model.cls_token, model.cls_token)
    assert extractor.transform.mean[0] == 0.5
    again = build_extractor(dataclasses.replace(extractor.config, weights="none"))
    assert again.model.state_dict().keys() == extractor.model.state_dict().keys()
    again.model.load_state_dict(extractor.model.state_dict())
    assert torch.equal(again(pixels), extractor(pixels))


def test_parse_named_values_reads_literals_and_keeps_words():
    assert parse_named_values(["pad_type=same", "depth=2", "size=(64, 32)", "flag=True"]) == {
        "pad_type": "same",
        "depth": 2,
        "size": (64, 32),
        "flag": True,
    }
    with pytest.raises(BadInput, match="'pad_type'"):
        parse_named_values(["pad_type"])


def test_build_extractor_real_weights_separate_real_photos(shared_data):
    from PIL import Image

    config = ExtractorConfig(
        name="mobilenetv2_100",
        weights=str(shared_data / "weights" / "mobilenetv2_100.safetensors"),
        args={"pad_type": "same"},
        image_size=160,
        resize="square",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        precision="fp32",
    )
    extractor = build_extractor(config).prepare_for_inference("cpu")
    folders = [shared_data / "grocery/images/test/Fruit" / name for name in ("Banana", "Kiwi", "Pineapple")]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.jpg"))[:6]]
    batch = torch.stack([extractor.transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        embeddings = extractor(batch)
    distances = torch.cdist(embeddings, embeddings).fill_diagonal_(float("inf"))
    labels = torch.arange(len(folders)).repeat_interleave(6)
    assert (labels[distances.argmin(dim=1)] == labels).float().mean() > 0.9


def test_hybrid_vision_transformer_runs_as_timm_does(pixels):
    """Its first layers are a small CNN; depth 1 keeps it small."""
    config = ExtractorConfig(name="vit_tiny_r_s16_p8_224", weights="none", args={"depth": 1}, image_size=64)
    extractor = build_extractor(dataclasses.replace(config, precision="fp32"))
    assert not extractor.is_plain_vit
    with torch.inference_mode():
        expected = extractor.model(extractor.normalise_pixels(pixels))
        torch.testing.assert_close(extractor.features(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args"),
    [("test_resnet", {"features_only": True}), ("test_resnet", {"global_pool": ""}), ("test_vit", {"global_pool": ""})],
)
def test_network_without_one_vector_an_image_is_refused_when_it_is_built(name, args):
    with pytest.raises(BadInput, match=r"gives no single vector an image; leave out features_only"):
        build_extractor(ExtractorConfig(name=name, weights="none", args=args, image_size=64))


@pytest.fixture(scope="module")
def resnet_state():
    return build_extractor(ExtractorConfig(name="test_resnet", weights="none", extractor_seed=4)).model.state_dict()


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


CHECKPOINTS = {
    "torch.compile": lambda state: prefixed(state, "_orig_mod."),
    "torch.compile and DataParallel": lambda state: prefixed(state, "module._orig_mod."),
    "moving average": lambda state: {"state_dict_ema": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {}},
    "a trunk": lambda state: prefixed(state, "trunk."),
    "a name of one's own, twice": lambda state: prefixed(state, "retrieval.encoder."),
    "mask token": lambda state: {**state, "mask_token": torch.zeros(1, 4)},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_weights_are_found_under_the_names_of_training_loops(kind, resnet_state, tmp_path):
    torch.save(CHECKPOINTS[kind](resnet_state), tmp_path / "w.pth")
    loaded = build_extractor(ExtractorConfig(name="test_resnet", weights=str(tmp_path / "w.pth"), image_size=64))
    assert all(torch.equal(value, resnet_state[name]) for name, value in loaded.model.state_dict().items())


def test_weights_that_are_no_state_dict_say_what_they_are(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"holds no state dict \(names and tensors\) but epoch, loss; save"):
        build_extractor(ExtractorConfig(name="test_resnet", weights=str(tmp_path / "w.pth")))


def test_weights_of_two_networks_in_one_file_are_refused(resnet_state, tmp_path):
    torch.save(prefixed(resnet_state, "model.") | prefixed(resnet_state, "module."), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"both become conv1"):
        build_extractor(ExtractorConfig(name="test_resnet", weights=str(tmp_path / "w.pth")))
