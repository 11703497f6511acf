"""Exports compared with torch by onnxruntime: 1,000 pairs of each kind of model, and what `verify` refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from online.examples import save_example

from distributed_rerank import command_line
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import BadInput
from distributed_rerank.models.saving import load_model
from distributed_rerank.online.onnx_files import OnnxModel, export_model, verify

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'distributed-rerank[onnx]'")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return export_model(save_example("token", folder / "model"), folder / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token", "concat", "split", "distance"])
def test_logits_are_those_of_torch_on_a_thousand_pairs(kind: str, tmp_path: Path) -> None:
    """The model as it is loaded, with encodings that are not rounded to 16 bits."""
    folder = save_example(kind, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    content["config"]["extractor"]["precision"] = "fp32"
    content["config"] |= {"split": {"storage": "fp32"}, "token": {"token_storage": "float32"}}.get(kind, {})
    (folder / "config.json").write_text(json.dumps(content))
    exported = OnnxModel(export_model(folder, tmp_path / "onnx"))
    model = load_model(folder)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (40, 3, *model.transform.size), dtype=torch.uint8, generator=generator)
    query, candidate = torch.randint(40, (2, 1000), generator=generator)
    distance = torch.rand(1000, generator=generator)
    with torch.inference_mode():
        encoded = model.encode(pixels)
        expected = model(encoded[query], encoded[candidate], distance).numpy()
    encodings = exported.encode(pixels.numpy())
    found = exported.logits(encodings[query.numpy()], encodings[candidate.numpy()], distance.numpy())
    assert found.dtype == np.float32
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_export_says_how_a_picture_becomes_pixels(token: Path) -> None:
    content = json.loads((token / "export.json").read_text())
    transform = content["transform"]
    made = InferenceTransform(**transform | {name: tuple(transform[name]) for name in ("size", "mean", "std")})
    assert made.size == (32, 32)
    assert (content["opset"], content["encoding"]["dtype"]) == (18, "float32")
    assert (token / "chain.json").is_file()


def test_verify_refuses_an_export_whose_logits_differ(token: Path, tmp_path: Path) -> None:
    assert verify(token) < 1e-4
    assert command_line.run(["verify", "--folder", str(token)]) is None
    other = export_model(save_example("token of a ViT", tmp_path / "vit"), tmp_path / "other")
    swapped = shutil.copytree(token, tmp_path / "swapped")
    head = (token / "head.onnx").read_bytes()
    (swapped / "head.onnx").write_bytes(head[:1000])
    with pytest.raises(BadInput, match="onnxruntime cannot load it"):
        verify(swapped)
    golden = bytearray((token / "golden.safetensors").read_bytes())
    # logits are stored as float32; a sign that is turned is found wherever it lies among them
    header = int.from_bytes(golden[:8], "little")
    start, stop = json.loads(golden[8 : 8 + header])["logit"]["data_offsets"]
    golden[8 + header + stop - 1] ^= 0x80
    assert stop - start == 64 * 4
    (swapped / "head.onnx").write_bytes(head)
    (swapped / "golden.safetensors").write_bytes(golden)
    with pytest.raises(BadInput, match="logits differ from those of the model by up to"):
        verify(swapped)
    assert verify(other) < 1e-4


def test_wrong_folders_are_refused(token: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists; give another folder"):
        command_line.run(["export", "--model", str(token.parent / "model"), "--out", str(token)])
    with pytest.raises(BadInput, match=r"it has no golden\.safetensors"):
        command_line.run(["verify", "--folder", str(tmp_path)])
