import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import Tensor, nn

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig, SplitSiameseConfig
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import read_image
from distributed_rerank.errors import BadInput
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.split_siamese import SplitSiamese
from distributed_rerank.models.stacked import logit_of_mean_probability, mlp_head

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def oml_forward(state: dict[str, Tensor], query: Tensor, gallery: Tensor, heads: int, patch: int = 16) -> Tensor:
    """OML 4.0.0's ConcatSiamese over its DINO ViT, written out in float64 from its source: images already
    normalised."""
    state = {name: value.double() for name, value in state.items()}
    vit = {name.removeprefix("extractor.model."): value for name, value in state.items()}

    def linear(x, name):
        return x @ vit[f"{name}.weight"].T + vit[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * vit[f"{name}.weight"]
            + vit[f"{name}.bias"]
        )

    image = torch.cat([query, gallery], dim=2).double()
    n, _, height, width = image.shape
    kernel = vit["patch_embed.proj.weight"]
    x = nn.functional.conv2d(image, kernel, vit["patch_embed.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    table = vit["pos_embed"]
    side, dim = math.isqrt(table.shape[1] - 1), table.shape[2]
    h0, w0 = height // patch + 0.1, width // patch + 0.1
    grid = nn.functional.interpolate(
        table[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2),
        scale_factor=(h0 / math.sqrt(side**2), w0 / math.sqrt(side**2)),
        mode="bicubic",
    )
    positions = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)
    x = torch.cat([vit["cls_token"].expand(n, -1, -1), x], dim=1) + positions
    for i in range(1 + max(int(name.split(".")[1]) for name in vit if name.startswith("blocks."))):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(n, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(n, -1, dim), f"blocks.{i}.attn.proj")
        hidden = nn.functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    embedding = norm(x, "norm")[:, 0]
    hidden = torch.sigmoid(embedding @ state["head.0.weight"].T + state["head.0.bias"])
    return (hidden @ state["head.3.weight"].T)[:, 0]


def test_concat_siamese_random_state_of_oml_gives_oml_logits(tmp_path, vit_config, pixels):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, hidden_dims=(8,)))
    generator = torch.Generator().manual_seed(1)
    state = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, tmp_path / "oml.ckpt")
    weights = str(tmp_path / "oml.ckpt")
    loaded = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, hidden_dims=(8,), pairwise_weights=weights))
    images = loaded.extractor.normalise_pixels(pixels)
    expected = oml_forward(state, images[:3], images[3:], heads=2)
    with torch.inference_mode():
        found = loaded(pixels[:3], pixels[3:], torch.zeros(3))
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("hidden_dims", [(12,), (8, 4), ()])
@pytest.mark.parametrize("build", [ConcatSiamese, SplitSiamese])
def test_siamese_takes_the_sizes_of_its_head_from_the_weights(tmp_path, vit_config, hidden_dims, build):
    config = ConcatSiameseConfig if build is ConcatSiamese else SplitSiameseConfig
    config = partial(config, extractor=vit_config, **({} if build is ConcatSiamese else {"split_at": 1}))
    saved = build(config(hidden_dims=hidden_dims))
    torch.save({f"model.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "oml.pth")
    loaded = build(config(pairwise_weights=str(tmp_path / "oml.pth")))
    assert loaded.config.hidden_dims == hidden_dims
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(BadInput, match=r"leave --hidden-dims out"):
        build(config(hidden_dims=(7, 7), pairwise_weights=str(tmp_path / "oml.pth")))


def test_concat_siamese_vit_small_has_oml_names_parameters_and_tokens():
    extractor = ExtractorConfig(name="vit_small_patch16_224.dino", weights="none", precision="fp32")
    model = ConcatSiamese(ConcatSiameseConfig(extractor=extractor, hidden_dims=(192,)))
    assert sum(p.numel() for p in model.parameters()) == 21_739_776
    seen = []
    model.extractor.model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    black = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    with torch.inference_mode():
        model(black, black, torch.zeros(1))
    assert seen == [393]
    oml = {f"extractor.model.{name}" for name in timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()}
    assert set(model.state_dict()) == oml | {"head.0.weight", "head.0.bias", "head.3.weight"}
    # 19.77 GFLOP in OML, less what the last block does for tokens other than the class token
    assert model.gflop_per_pair() == pytest.approx(18.4, abs=0.1)


def test_concat_siamese_cnn_sees_the_query_above_the_gallery_image(cnn_config, pixels):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=cnn_config))
    with torch.inference_mode():
        stacked = torch.cat([pixels[:3], pixels[3:]], dim=2)
        expected = model.head(model.extractor.model(model.extractor.normalise_pixels(stacked))).squeeze(1)
        found = model(pixels[:3], pixels[3:], torch.zeros(3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(model.encode(pixels), pixels)


def test_concat_siamese_both_orders_is_the_mean_of_probabilities_and_symmetric(vit_config, pixels):
    one = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config))
    both = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, both_orders=True))
    a, b, zero = pixels[:3], pixels[3:], torch.zeros(3)
    with torch.inference_mode():
        forward, backward, mean = one(a, b, zero), one(b, a, zero), both(a, b, zero)
        assert not torch.equal(forward, backward)
        torch.testing.assert_close(mean.sigmoid(), (forward.sigmoid() + backward.sigmoid()) / 2)
        assert torch.equal(mean, both(b, a, zero))
    assert both.gflop_per_pair() == pytest.approx(2 * one.gflop_per_pair())


def test_logit_of_mean_probability_keeps_order_where_probabilities_saturate():
    a = torch.tensor([-300.0, -200.0, 0.0, 200.0, 300.0])
    torch.testing.assert_close(logit_of_mean_probability(a, a), a)
    assert (logit_of_mean_probability(a, a + 1).diff() > 0).all()


def test_mlp_head_is_linear_sigmoid_dropout_and_a_linear_without_bias():
    kinds = [type(layer) for layer in mlp_head(8, (6, 4), 0.5, seed=0)]
    assert kinds == [nn.Linear, nn.Sigmoid, nn.Dropout, nn.Linear, nn.Sigmoid, nn.Dropout, nn.Linear]
    assert set(mlp_head(8, (6,), 0.5, seed=0).state_dict()) == {"0.weight", "0.bias", "3.weight"}


def test_concat_siamese_weights_with_another_head_are_refused(tmp_path, vit_config):
    small = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, hidden_dims=(8,)))
    wide = {
        name: torch.cat([value, value], dim=1) if name == "head.0.weight" else value
        for name, value in small.state_dict().items()
    }
    torch.save(wide, tmp_path / "small.pth")
    with pytest.raises(BadInput, match=r"small\.pth .*head\.0\.weight is \(8, 128\) in place of \(8, 64\)"):
        ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, pairwise_weights=str(tmp_path / "small.pth")))
    torch.save(small.head.state_dict(), tmp_path / "head.pth")
    with pytest.raises(BadInput, match="hold no 'extractor"):
        ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, pairwise_weights=str(tmp_path / "head.pth")))


def test_concat_siamese_training_step_lowers_the_loss(vit_config, pixels):
    model = ConcatSiamese(ConcatSiameseConfig(extractor=vit_config, dropout=0.0)).train()
    optimiser = torch.optim.AdamW(model.parameter_groups(lr=1e-2, backbone_lr=1e-4))
    target, losses = torch.tensor([0.0, 1.0, 1.0]), []
    for _ in range(15):
        loss = nn.functional.binary_cross_entropy_with_logits(model(pixels[:3], pixels[3:], torch.zeros(3)), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-4), ("fp32", 1e-6), ("bf16", 1e-2)])
def test_concat_siamese_scores_the_pairs_of_oml_alike(precision, tolerance):
    """Against the figures of oml_peer.py, run where open-metric-learning 4.0.0 is installed: as the model is trained
    (None), and prepared for inference."""
    folder = os.environ.get("DISTRIBUTED_RERANK_OML")
    if not folder:
        pytest.skip(
            "DISTRIBUTED_RERANK_OML names no folder; make one: `python make_photos.py DIR --labels 6`, "
            "then with OML 4.0.0 `python oml_peer.py DIR --out DIR --top-n 5 --train-steps 0 --skip-search`"
        )
    root = Path(folder)
    extractor = ExtractorConfig(
        name="vit_small_patch16_224",
        weights="none",
        image_size=224,
        resize="square",
        interpolation="bilinear",
        precision=precision or "fp32",
        **IMAGENET,
    )
    model = ConcatSiamese(ConcatSiameseConfig(extractor=extractor, pairwise_weights=str(root / "concat_siamese.pth")))
    if precision is not None:
        model.prepare_for_inference("cpu")
    table, scored = pd.read_csv(root / "df.csv"), np.load(root / "candidates.npz")
    refs = [ImageRef(id=path, path=str(root / path), box=None) for path in table["path"]]
    pixels = torch.stack([model.transform(read_image(ref)) for ref in refs])
    query, gallery = (torch.from_numpy(scored[f"{side}_ids"]) for side in ("query", "gallery"))
    with torch.inference_mode():
        parts = [
            model(pixels[q], pixels[g], torch.zeros(len(q)))
            for q, g in zip(query.split(8), gallery.split(8), strict=True)
        ]
    found = torch.cat(parts).sigmoid()
    torch.testing.assert_close(found, torch.from_numpy(scored["pair_distances"]).float(), rtol=0, atol=tolerance)
