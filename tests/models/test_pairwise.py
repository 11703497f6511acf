import copy
import dataclasses

import pytest
import torch
from bits import assert_same
from torch import nn

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import (
    ConcatSiameseConfig,
    DistanceSiameseConfig,
    SplitSiameseConfig,
    TokenSiameseConfig,
)
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.split_siamese import SplitSiamese
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.runtime.devices import torch_threads

BUILDERS = {
    "concat": lambda c: ConcatSiamese(ConcatSiameseConfig(extractor=c)),
    "distance": lambda c: DistanceSiamese(DistanceSiameseConfig(extractor=c)),
    "split": lambda c: SplitSiamese(SplitSiameseConfig(extractor=c, split_at=1)),
    "token": lambda c: TokenSiamese(TokenSiameseConfig(extractor=c, token_dim=16, global_dim=16, grid=3)),
}


def logits(model, pixels, distance):
    encoded = model.encode(pixels)
    return model(encoded[:3], encoded[3:], distance)


@pytest.fixture(params=BUILDERS)
def model(request, vit_config):
    return BUILDERS[request.param](vit_config)


def test_pairwise_model_encoding_has_the_stated_shape_type_and_size(model, pixels):
    with torch.inference_mode():
        encoded = model.encode(pixels)
    assert encoded.shape == (6, *model.encoding_shape)
    assert encoded.dtype == model.encoding_dtype
    assert model.bytes_per_image == encoded[0].numel() * encoded.element_size()


def test_pairwise_model_logits_are_float32_and_pairs_do_not_see_each_other(model, pixels):
    distance = torch.rand(3)
    with torch.inference_mode():
        encoded = model.encode(pixels)
        together = model(encoded[:3], encoded[3:], distance)
        alone = torch.cat([model(encoded[i : i + 1], encoded[i + 3 : i + 4], distance[i : i + 1]) for i in range(3)])
    assert together.shape == (3,)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 13, 50])
def test_pairwise_model_bits_do_not_depend_on_the_batch(model, size):
    """One pair online and the same pair among thousands in a job: the same logit to the last bit, on a CPU."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.prepare_for_inference("cpu")
    with torch.inference_mode(), torch_threads(1):
        encoded = torch.cat([model.encode(part) for part in pixels.split(16)])
        assert_same(torch.cat([model.encode(part) for part in pixels.split(size)]), encoded)
        query, candidate = encoded[torch.randint(32, (2, 100), generator=generator)]
        distance = torch.rand(100, generator=generator)
        parts = zip(*(x.split(size) for x in (query, candidate, distance)), strict=True)
        assert torch.equal(torch.cat([model(*part) for part in parts]), model(query, candidate, distance))


def test_pairwise_model_prepared_in_bf16_keeps_float32_logits(model, pixels):
    expected = logits(model, pixels, torch.rand(3, generator=torch.Generator().manual_seed(0)))
    model.extractor.config = dataclasses.replace(model.extractor.config, precision="auto")
    model.prepare_for_inference("cpu")
    with torch.inference_mode():
        found = logits(model, pixels, torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert found.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=5e-2)


def test_pairwise_model_prepared_leaves_cached_encodings_as_they_are(model, pixels):
    """Every encoding is scored many times."""
    model.extractor.config = dataclasses.replace(model.extractor.config, precision="auto")
    model.prepare_for_inference("cpu")
    with torch.inference_mode():
        encoded = model.encode(pixels)
        before = encoded.clone()
        first, second = (model(encoded[:3], encoded[3:], torch.zeros(3)) for _ in range(2))
    assert torch.equal(encoded, before)
    assert torch.equal(first, second)


def test_pairwise_model_gflop_is_measured_without_changing_the_model(model):
    before = copy.deepcopy(model.state_dict())
    assert model.gflop_per_pair() > 0
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_pairwise_model_same_seed_gives_the_same_weights(vit_config):
    for build in BUILDERS.values():
        first, second = build(vit_config).state_dict(), build(vit_config).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_freeze_backbone_stops_gradients_and_statistics_but_not_the_head(cnn_config, pixels):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=cnn_config, dropout=0.0)).freeze_backbone().train()
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameter_groups(lr=0.1, backbone_lr=0.1))
    for _ in range(2):
        optimiser.zero_grad()
        logits(model, pixels, torch.zeros(3)).sum().backward()
        optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith("extractor."), name
    assert not model.extractor.training
    assert model.head.training
    assert model.train().extractor.training is False


def test_unfreeze_backbone_lets_it_learn_again(cnn_config, pixels):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=cnn_config)).freeze_backbone().unfreeze_backbone().train()
    logits(model, pixels, torch.zeros(3)).sum().backward()
    assert model.extractor.model.conv1[0].weight.grad.abs().sum() > 0


def test_train_batch_normalisation_keeps_its_statistics_so_that_halves_equal_the_whole(cnn_config, pixels):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=cnn_config, dropout=0.0)).train()
    before = copy.deepcopy(model.state_dict())
    assert model.extractor.model.training
    whole = logits(model, pixels, torch.zeros(3))
    parts = [model(pixels[i : i + 1], pixels[i + 3 : i + 4], torch.zeros(1)) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for name in norms:
        assert torch.equal(model.state_dict()[f"{name}.running_mean"], before[f"{name}.running_mean"])


def test_parameter_groups_cover_every_trainable_parameter_once(vit_config):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config))
    groups = model.parameter_groups(lr=1e-3, backbone_lr=1e-5)
    assert {group["name"]: group["lr"] for group in groups} == {"backbone": 1e-5, "head": 1e-3}
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    frozen = model.freeze_backbone().parameter_groups(lr=1e-3, backbone_lr=1e-5)
    assert [group["name"] for group in frozen] == ["head"]


@pytest.mark.parametrize("kind", ["concat", "split", "distance", "cnn"])
def test_pairwise_model_with_gradient_checkpointing_has_the_same_gradient_and_keeps_less_for_it(
    kind, vit_config, cnn_config, pixels
):
    deeper = dataclasses.replace(vit_config, args={**vit_config.args, "depth": 6})
    build = BUILDERS["concat" if kind == "cnn" else kind]
    plain = build(cnn_config if kind == "cnn" else deeper)
    kept = {}
    for name, model in {"plain": plain, "checkpointed": copy.deepcopy(plain).checkpoint_gradients()}.items():
        sizes = []

        def pack(kept_tensor, sizes=sizes):
            sizes.append(kept_tensor.numel())
            return kept_tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = logits(model, pixels, torch.ones(3)).sum()
        loss.backward()
        gradients = {parameter: value.grad for parameter, value in model.named_parameters() if value.grad is not None}
        kept[name] = (sum(sizes), gradients)
    assert kept["checkpointed"][1].keys() == kept["plain"][1].keys() != set()
    torch.testing.assert_close(kept["checkpointed"][1], kept["plain"][1])
    assert kept["checkpointed"][0] < 0.7 * kept["plain"][0], (kept["checkpointed"][0], kept["plain"][0])


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_pe_core_tiny_patch16_384", "test_vit3"])
def test_concat_with_attention_pooling_counts_its_operations(name):
    """Counting them must not ask for gradients, which the fused attention of the pooling refuses."""
    args = {} if name == "test_vit3" else {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    extractor = ExtractorConfig(name=name, weights="none", args=args, image_size=32 if args else None)
    model = ConcatSiamese(ConcatSiameseConfig(extractor=extractor))
    assert model.gflop_per_pair() > 0
