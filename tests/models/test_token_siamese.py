import pytest
import torch

from distributed_rerank.config.pairwise import TokenSiameseConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.maxsim import maxsim_of
from distributed_rerank.models.token_siamese import TokenSiamese

SMALL = {"grid": 3, "token_dim": 16, "global_dim": 24, "pools": (1, 2)}


def encode_and_score(model, pixels, distance):
    with torch.inference_mode():
        encoded = model.encode(pixels)
        return model(encoded[:3], encoded[3:], distance)


@pytest.mark.parametrize("depths", [(-1,), (-2, -1)])
@pytest.mark.parametrize("backbone", ["vit_config", "cnn_config"])
def test_token_siamese_untrained_logit_is_the_first_stage_distance(request, pixels, backbone, depths):
    model = TokenSiamese(TokenSiameseConfig(extractor=request.getfixturevalue(backbone), depths=depths, **SMALL))
    distance = torch.tensor([0.3, 0.1, 0.1000001])
    assert torch.equal(encode_and_score(model, pixels, distance), distance)


def test_token_siamese_scaled_but_untrained_keeps_the_first_stage_order(cnn_config, pixels):
    model = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, **SMALL))
    encoded = model.encode(pixels)
    distance = torch.rand(6, generator=torch.Generator().manual_seed(1))
    model.fit_head(encoded, encoded.flip(0), distance)
    with torch.inference_mode():
        logits = model(encoded, encoded.flip(0), distance)
    assert torch.equal(logits.argsort(), distance.argsort())
    torch.testing.assert_close(logits.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.std(correction=0), torch.tensor(1.0), rtol=0, atol=1e-4)


def test_token_siamese_pair_features_are_the_stated_ones(cnn_config, pixels):
    model = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, token_storage="float32", **SMALL))
    with torch.inference_mode():
        a, b = model.encode(pixels)[:2]
        found = model.pair_features(a[None], b[None], torch.tensor([0.7]))[0]
    expected = [torch.tensor([0.7])]
    vectors_a, vectors_b = (x[2 * 9 * 16 :].reshape(5, 24) for x in (a, b))
    expected.append(torch.stack([u @ v for u, v in zip(vectors_a, vectors_b, strict=True)]))
    best, means, diagonals = [], [], []
    for depth in range(2):
        s = a[: 2 * 9 * 16].reshape(2, 9, 16)[depth] @ b[: 2 * 9 * 16].reshape(2, 9, 16)[depth].T
        rows, columns = s.max(dim=1).values.sort().values, s.max(dim=0).values.sort().values
        best.append((rows + columns) / 2)
        means.append(best[-1].mean()[None])
        diagonals.append(s.diag().mean()[None])
    torch.testing.assert_close(found, torch.cat([*expected, *best, *means, *diagonals]))


@pytest.mark.parametrize(
    ("storage", "size", "tolerance"), [("float32", 4, 1e-6), ("float16", 2, 1e-3), ("int8", 1, 5e-3)]
)
def test_token_siamese_storage_changes_bytes_and_hardly_the_encoding(cnn_config, pixels, storage, size, tolerance):
    exact = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, token_storage="float32", **SMALL))
    stored = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, token_storage=storage, **SMALL))
    assert stored.bytes_per_image == (2 * 9 * 16 + 5 * 24) * size
    with torch.inference_mode():
        found = stored.encode(pixels).float() / (127 if storage == "int8" else 1)
        torch.testing.assert_close(found, exact.encode(pixels), rtol=0, atol=tolerance)


def test_token_siamese_logit_is_the_same_for_both_orders(cnn_config, pixels):
    model = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, **SMALL))
    torch.nn.init.normal_(model.head.linear.weight)
    first = encode_and_score(model, pixels, torch.ones(3))
    torch.testing.assert_close(encode_and_score(model, pixels.roll(3, dims=0), torch.ones(3)), first)
    assert first.std() > 0


def test_token_siamese_encode_is_encode_features_of_local_features(vit_config, pixels):
    model = TokenSiamese(TokenSiameseConfig(extractor=vit_config, **SMALL))
    with torch.inference_mode():
        features = model.local_features(pixels)
        assert torch.equal(model.encode_features(features), model.encode(pixels))
        embedding = features[:, -model.extractor.dim :].float()
        torch.testing.assert_close(embedding, model.extractor(pixels), rtol=0, atol=1e-3)


def test_token_siamese_fit_encoder_is_deterministic_and_brings_labels_together(cnn_config, pixels):
    noise = torch.randint(-40, 41, (6, 8, 3, 64, 64), generator=torch.Generator().manual_seed(4))
    views = (pixels[:, None].int() // 2 + noise + 40).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    labels = torch.arange(6).repeat_interleave(8)
    model = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, **SMALL))
    with torch.inference_mode():
        features = model.local_features(views)
        model.fit_encoder(features, labels)
        encoded = model.encode_features(features).float()
        model.fit_encoder(features, labels)
        assert torch.equal(model.encode_features(features).float(), encoded)
    similarity = encoded[:, 2 * 9 * 16 :] @ encoded[:, 2 * 9 * 16 :].T
    same = labels[:, None] == labels[None]
    assert similarity[same & ~torch.eye(48, dtype=torch.bool)].mean() > similarity[~same].mean() + 1


def test_token_siamese_head_learns_and_the_encoder_has_nothing_to_learn(cnn_config, pixels):
    model = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, head_dropout=0.0, **SMALL)).freeze_backbone().train()
    with torch.no_grad():
        encoded = model.encode(pixels)
    query, gallery = encoded[[0, 1, 2, 0, 1, 2]], encoded[[0, 1, 2, 3, 4, 5]]
    target, distance = torch.tensor([0.0] * 3 + [1.0] * 3), torch.full((6,), 0.5)
    model.fit_head(query, gallery, distance)
    groups = model.parameter_groups(lr=1e-2, backbone_lr=0.0)
    assert [group["name"] for group in groups] == ["head"]
    optimiser = torch.optim.AdamW(groups)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(query, gallery, distance), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2


def test_token_siamese_depth_that_does_not_exist_is_refused(cnn_config):
    with pytest.raises(BadInput, match=r"resnet10t has no feature maps at depths \(9,\)"):
        TokenSiamese(TokenSiameseConfig(extractor=cnn_config, depths=(9,)))


def test_maxsim_is_the_mean_best_match_of_tokens_in_both_directions(cnn_config, pixels):
    model = TokenSiamese(TokenSiameseConfig(extractor=cnn_config, token_storage="float32", **SMALL))
    with torch.inference_mode():
        encoded = model.encode(pixels)
        found = maxsim_of(model)(encoded[:3], encoded[3:], torch.zeros(3))
    tokens = encoded[:, : 2 * 9 * 16].reshape(-1, 2, 9, 16)
    for pair in range(3):
        best = []
        for depth in range(2):
            s = tokens[pair, depth] @ tokens[3 + pair, depth].T
            best += [s.max(dim=0).values.mean(), s.max(dim=1).values.mean()]
        torch.testing.assert_close(found[pair], -torch.stack(best).mean())
    assert maxsim_of(model).gflop_per_pair() == pytest.approx(2 * 2 * 9 * 9 * 16 / 1e9)
