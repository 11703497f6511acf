import torch

from distributed_rerank.config.pairwise import DistanceSiameseConfig
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.extractor import build_extractor


def test_distance_siamese_identity_reproduces_the_first_stage(vit_config, pixels):
    with torch.inference_mode():
        embeddings = build_extractor(vit_config)(pixels)
        query, gallery = torch.triu_indices(6, 6, offset=1)
        first_stage = torch.cdist(embeddings.double(), embeddings.double())[query, gallery].float()
        for linear in (False, True):
            model = DistanceSiamese(DistanceSiameseConfig(extractor=vit_config, linear=linear))
            encoded = model.encode(pixels)
            found = model(encoded[query], encoded[gallery], first_stage)
            torch.testing.assert_close(found, first_stage, rtol=0, atol=1e-5)
            assert torch.equal(found.argsort(), first_stage.argsort())


def test_distance_siamese_bias_and_random_map_change_the_distance_as_stated(vit_config, pixels):
    config = DistanceSiameseConfig(extractor=vit_config, identity_init=False, output_bias=-2.0)
    model = DistanceSiamese(config)
    with torch.inference_mode():
        encoded = model.encode(pixels)
        found = model(encoded[:3], encoded[3:], torch.zeros(3))
        mapped = encoded.double() @ model.proj.weight.double().T
    torch.testing.assert_close(found.double(), (mapped[:3] - mapped[3:]).norm(dim=1) - 2.0, rtol=0, atol=1e-5)


def test_distance_siamese_linear_map_learns(vit_config, pixels):
    model = DistanceSiamese(DistanceSiameseConfig(extractor=vit_config)).freeze_backbone().train()
    encoded = model.encode(pixels)
    model(encoded[:3], encoded[3:], torch.zeros(3)).sum().backward()
    assert model.proj.weight.grad.abs().sum() > 0
