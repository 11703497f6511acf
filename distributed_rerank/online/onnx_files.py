"""A pairwise model as two ONNX files, with pairs whose logits are known, so that any runtime can be compared.

    encoder.onnx    pixels [image, 3, height, width] uint8               -> encoding [image, ...]
    head.onnx       query, candidate [pair, ...], distance [pair] float32 -> logit [pair] float32

The first axis of every tensor is free; opset 18. Mean and deviation are part of the encoder; how a picture becomes
pixels stands in export.json. All is float32, encodings included, whatever the model computes in elsewhere and keeps.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_rerank.config.pairwise import SplitSiameseConfig, TokenSiameseConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.saving import build_model, load_model, local_folder
from distributed_rerank.runtime.devices import torch_threads
from distributed_rerank.storage.files import write_json

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference of a logit that counts as rounding."""
N_IMAGES, N_PAIRS = 16, 64
_INPUTS = ("query", "candidate", "distance")


class _Encode(nn.Module):
    def __init__(self, model: PairwiseModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels)


def export_model(model: str | Path, out: Path) -> Path:
    """Write encoder.onnx, head.onnx, golden.safetensors, export.json and, if there is one, chain.json to `out`.

    Compared by onnxruntime before it returns. Raises BadInput where `out` exists, where onnx, onnxscript or onnxruntime
    are not installed, for a model that ONNX cannot express, and where its logits differ by more than `TOLERANCE`.
    """
    _runtime()
    if out.exists():
        raise BadInput(f"--out {out} exists; give another folder")
    folder = local_folder(model)
    with torch_threads(1):
        network = _in_float32(load_model(folder))
        golden = golden_pairs(network)
        staging = out.with_name(f".{out.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            _write(network, golden, staging)
            if (folder / "chain.json").is_file():
                shutil.copyfile(folder / "chain.json", staging / "chain.json")
            verify(staging)
            staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return out


def golden_pairs(model: PairwiseModel) -> dict[str, Tensor]:
    """Pictures, pairs of them with distances, and the logits of the model in float32, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    # Noise at four scales: edges and areas as in photos.
    size, images = model.transform.size, torch.zeros(N_IMAGES, 3, *model.transform.size)
    for cells in (2, 5, 11, 23):
        noise = torch.rand(N_IMAGES, 3, cells, cells, generator=generator)
        images += nn.functional.interpolate(noise, size=size, mode="bilinear") / 4
    pixels = (images * 255).round().to(torch.uint8)
    query, candidate = torch.randint(N_IMAGES, (2, N_PAIRS), generator=generator)
    distance = torch.rand(N_PAIRS, generator=generator) * 1.4
    with torch.inference_mode():
        encoded = model.encode(pixels)
        logit = model(encoded[query], encoded[candidate], distance)
    return {"pixels": pixels, "query": query, "candidate": candidate, "distance": distance, "logit": logit}


def verify(folder: Path) -> float:
    """The largest difference between the golden logits and those that onnxruntime computes from the folder's files.

    Raises BadInput where it exceeds `TOLERANCE`, where a logit is not finite, and for a folder that is no export.
    """
    golden = read_golden(folder)
    run = OnnxModel(folder)
    encoded = run.encode(golden["pixels"])
    logits = run.logits(encoded[golden["query"]], encoded[golden["candidate"]], golden["distance"])
    difference = float(np.abs(logits - golden["logit"]).max())
    if not difference <= TOLERANCE:
        raise BadInput(
            f"{folder}: logits differ from those of the model by up to {difference:.2g}, more than {TOLERANCE:g}; "
            "export the model again"
        )
    return difference


def read_golden(folder: Path) -> dict[str, np.ndarray]:
    """The pairs that were stored with an export."""
    path = folder / "golden.safetensors"
    if not path.is_file():
        raise BadInput(f"{folder} is no export: it has no golden.safetensors; give a folder of `export`")
    return {name: value.numpy() for name, value in safetensors.torch.load_file(path).items()}


class OnnxModel:
    """Both files of an export, run by onnxruntime on the CPU."""

    def __init__(self, folder: Path) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        try:
            self._encoder = runtime.InferenceSession(str(folder / "encoder.onnx"), options, providers=providers)
            self._head = runtime.InferenceSession(str(folder / "head.onnx"), options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no class of their own
            reason = str(error).splitlines()[0]
            raise BadInput(f"{folder}: onnxruntime cannot load it ({reason}); export the model again") from error

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encodings of images [image, 3, height, width] of type uint8."""
        return self._encoder.run(None, {"pixels": pixels})[0]

    def logits(self, query: np.ndarray, candidate: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Logits of pairs of encodings with their first-stage distances."""
        return self._head.run(None, dict(zip(_INPUTS, (query, candidate, distance), strict=True)))[0]


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401  # pyright: ignore
        import onnxruntime  # pyright: ignore[reportMissingImports]
        import onnxscript  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise BadInput(f"ONNX needs more packages ({error}); pip install 'distributed-rerank[onnx]'") from error
    return onnxruntime


def _in_float32(model: PairwiseModel) -> PairwiseModel:
    """The same model with float32 throughout, its cached encodings included.

    Rounded to 16 bits, two runtimes' encodings would differ by a whole step here and there, and logits by 1e-4.
    """
    config = replace(model.config, extractor=replace(model.config.extractor, precision="fp32", weights="none"))
    if isinstance(config, SplitSiameseConfig):
        config = replace(config, storage="fp32")
    if isinstance(config, TokenSiameseConfig):
        config = replace(config, token_storage="float32")
    again = build_model(config)
    again.load_state_dict(model.state_dict())
    return again.eval().requires_grad_(False)  # pyright: ignore[reportReturnType]


def _write(model: PairwiseModel, golden: dict[str, Tensor], folder: Path) -> None:
    pixels = golden["pixels"][:4]
    with torch.no_grad():
        encoded = model.encode(pixels)
    pairs = (encoded, encoded.flip(0).clone(), golden["distance"][:4])
    free = {0: torch.export.Dim.DYNAMIC}
    parts = (
        (_Encode(model).eval(), (pixels,), "encoder.onnx", ("pixels",), "encoding"),
        (model, pairs, "head.onnx", _INPUTS, "logit"),
    )
    for module, inputs, name, names, output in parts:
        try:
            torch.onnx.export(
                module, inputs, folder / name, input_names=list(names), output_names=[output], opset_version=OPSET,
                dynamo=True, dynamic_shapes=(free,) * len(names), external_data=False, verbose=False,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BadInput(f"{name}: this model cannot be expressed in ONNX ({reason})") from error
    stored = {key: value.contiguous() for key, value in golden.items()}
    safetensors.torch.save_file(stored, folder / "golden.safetensors")
    described = {
        "opset": OPSET,
        "model": type(model).__name__,
        "encoding": {"shape": list(model.encoding_shape), "dtype": str(model.encoding_dtype).removeprefix("torch.")},
        "transform": json.loads(json.dumps(asdict(model.transform))),
        "tolerance": TOLERANCE,
    }
    write_json(folder / "export.json", described)
