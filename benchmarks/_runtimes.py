"""Other ways to run a pairwise model's forward on a CPU: torch.compile with frozen weights, and OpenVINO."""

import copy
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.models import vit
from distributed_rerank.models.pairwise import PairwiseModel

RUNTIMES = ("packed", "compiled", "openvino")
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_of(
    runtime: str, model: PairwiseModel, precision: str, threads: int, example: tuple[Tensor, ...]
) -> Forward:
    """The forward of an untrained, unprepared `model` (left as it is) for inputs of the shapes of `example`."""
    model = copy.deepcopy(model)
    if runtime == "packed":  # what the scorer runs
        model.extractor.config = _with_precision(model, precision)
        return model.prepare_for_inference("cpu")
    model.eval().requires_grad_(False)
    if runtime == "compiled":
        return _compiled(model, precision)
    assert runtime == "openvino", f"no runtime {runtime!r}"
    return _openvino(model, precision, threads, example)


def _compiled(model: PairwiseModel, precision: str) -> Forward:
    """torch.compile with the weights folded into the graph as constants, in the format that oneDNN likes."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    model.extractor.config = _with_precision(model, precision)
    if precision == "bf16":
        model.extractor.model.to(torch.bfloat16)
    return torch.compile(model, dynamic=False)


def _openvino(model: PairwiseModel, precision: str, threads: int, example: tuple[Tensor, ...]) -> Forward:
    """OpenVINO's CPU plugin; it needs the package openvino."""
    openvino = importlib.import_module("openvino")
    model.extractor.config = _with_precision(model, "fp32")  # the plugin chooses its own format
    if model.extractor.is_plain_vit:
        vit.keep_positions(model.extractor.model)  # resampled here, since tracing cannot follow it
        with torch.inference_mode():
            model(*example)
    example = tuple(map(_without_bf16, example))
    converted = openvino.convert_model(torch.export.export(model, example))
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(converted, "CPU", hints)

    def forward(query: Tensor, candidate: Tensor, distance: Tensor) -> Tensor:
        return torch.from_numpy(compiled([_without_bf16(x).numpy() for x in (query, candidate, distance)])[0])

    return forward


def _without_bf16(tensor: Tensor) -> Tensor:
    """NumPy has no bf16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _with_precision(model: PairwiseModel, precision: Any) -> ExtractorConfig:
    return dataclasses.replace(model.extractor.config, precision=precision)
