import dataclasses

import pytest
import torch

from distributed_rerank.config.pairwise import ConcatSiameseConfig, SplitSiameseConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.split_siamese import SplitSiamese


@pytest.fixture
def concat(vit_config, tmp_path):
    """A ConcatSiamese with large random weights, so that positions and roles matter, and the file that holds
    them."""
    model = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config))
    generator = torch.Generator().manual_seed(2)
    state = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    torch.save(state, tmp_path / "concat.pth")
    return model, str(tmp_path / "concat.pth")


def score(model, pixels):
    with torch.inference_mode():
        encoded = model.encode(pixels)
        return model(encoded[:3], encoded[3:], torch.zeros(3))


def test_split_siamese_at_0_is_concat_siamese(vit_config, pixels, concat):
    model, path = concat
    split = SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=0, storage="fp32", pairwise_weights=path))
    assert split.state_dict().keys() == model.state_dict().keys()
    expected = score(model, pixels)
    assert (expected - score(model, pixels.roll(3, dims=0))).abs().min() > 1e-3
    torch.testing.assert_close(score(split, pixels), expected, rtol=0, atol=1e-4)


def test_split_siamese_later_split_costs_less_and_starts_near(vit_config, pixels, concat):
    models = [
        SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=k, storage="fp32", pairwise_weights=concat[1]))
        for k in range(3)
    ]
    costs = [model.gflop_per_pair() for model in models]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < costs[0] / 3


@pytest.mark.parametrize(("storage", "size", "tolerance"), [("fp32", 4, 1e-6), ("fp16", 2, 1e-2), ("bf16", 2, 1e-1)])
def test_split_siamese_storage_changes_bytes_and_hardly_the_logit(vit_config, pixels, storage, size, tolerance):
    exact = SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=1, storage="fp32"))
    stored = SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=1, storage=storage))
    assert stored.bytes_per_image == (16 + 1) * 64 * size
    torch.testing.assert_close(score(stored, pixels), score(exact, pixels), rtol=0, atol=tolerance)


def test_split_siamese_both_orders_is_symmetric(vit_config, pixels):
    model = SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=1, both_orders=True))
    assert torch.equal(score(model, pixels), score(model, pixels.roll(3, dims=0)))


def test_split_siamese_all_parameters_learn_end_to_end(vit_config, pixels):
    model = SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=1, storage="fp32")).train()
    encoded = model.encode(pixels)
    model(encoded[:3], encoded[3:], torch.zeros(3)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_split_siamese_impossible_split_and_network_are_refused(vit_config, cnn_config):
    with pytest.raises(BadInput, match="split_at=3 must be from 0 to 2"):
        SplitSiamese(SplitSiameseConfig(extractor=vit_config, split_at=3))
    with pytest.raises(BadInput, match="resnet10t is none"):
        SplitSiamese(SplitSiameseConfig(extractor=cnn_config))
    averaged = dataclasses.replace(vit_config, args={**vit_config.args, "global_pool": "avg"})
    with pytest.raises(BadInput, match="plain timm vision transformer"):
        SplitSiamese(SplitSiameseConfig(extractor=averaged))
