"""Parts of gpu.py that say what the machine is and whether results on it are right."""

import copy
import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _gpu_project as project
import numpy as np
import torch
from _gpu_measure import Context, matmul_peak, rate, relative_error

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "pandas", "pillow", "pyarrow", "ray", "nvidia-nccl-cu13")

BOUNDS = {"fp32": 5e-2, "fp32, TF32 everywhere": 5e-2, "fp32, TF32 nowhere": 5e-4, "bf16": 0.1}
"""Largest error of a logit or embedding, over the deviation of the reference among the pairs.

torch lets convolutions of float32 use TF32 unless told otherwise, so fp32 as found is only a little stricter than bf16.
"""
UPDATE_BOUNDS = {"fp32": 5e-2, "bf16": 0.2}
"""Largest error of what training changes in the weights, over the size of that change."""


def machine(context: Context) -> None:
    """Versions, device, and the ceilings: matrix products and copies."""
    context.row("Python", "", f"{platform.python_version()} on {project.CORES} cores, {platform.machine()}")
    for name in PACKAGES:
        try:
            context.row(name, "", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            context.row(name, "", "not installed")
    if context.is_gpu:
        found = torch.cuda.get_device_properties(context.device)
        context.row("device", "", f"{found.name}, {found.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}")
        context.row("multiprocessors", "", float(found.multi_processor_count))
    else:
        context.row("device", "", "the processor; no GPU is seen")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        context.row(f"matrix product, {name}", "TFLOP/s", matmul_peak(dtype, context) / 1e12)
    with tf32(True):
        context.row("matrix product, TF32", "TFLOP/s", matmul_peak(torch.float32, context) / 1e12)
    n_bytes = 2**22 if context.is_quick else 2**31
    source = torch.randint(0, 127, (n_bytes,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)

    def copy_on_device() -> int:
        target.copy_(source)
        return 2 * n_bytes

    context.row("copy on the device, bytes read and written", "GB/s", rate(copy_on_device, context) / 1e9)
    if not context.is_gpu:
        return
    for name, is_pinned in (("pageable", False), ("pinned", True)):
        host = torch.randint(0, 127, (2**28,), dtype=torch.uint8).pin_memory() if is_pinned else source[: 2**28].cpu()

        def to_device(host: torch.Tensor = host) -> int:
            target[: len(host)].copy_(host, non_blocking=True)
            return len(host)

        context.row(f"copy to the device, {name} memory", "GB/s", rate(to_device, context) / 1e9)


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 with TF32, or without; the settings come back afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def correctness(context: Context) -> None:
    """Everything on the device against the processor in float64: the same weights, images and pairs."""
    context.row("TF32 as found, products", "", torch.get_float32_matmul_precision())
    context.row("TF32 as found, convolutions", "", str(torch.backends.cudnn.allow_tf32))
    size = project.sizes(context.is_quick)
    for name in ("concat", *size.splits, "token"):
        with context.attempt(f"{name}: errors"):
            check_pairs(name, size, context)
    for kind in ("vit", "cnn"):
        with context.attempt(f"extractor {kind}: errors"):
            check_extractor(kind, size, context)
    with context.attempt("search: errors"):
        check_search(context)
    with context.attempt("training: errors"):
        check_training(size, context)


def precisions(context: Context) -> list[str]:
    """fp32, and bf16 where the device has it."""
    if project.has_bf16(context.device):
        return ["fp32", "bf16"]
    context.row("bf16", "", "not on this device")
    return ["fp32"]


def check_pairs(name: str, size: project.Sizes, context: Context) -> None:
    """Logits of one pairwise model, encodings in float32."""
    n = 12 if context.is_quick else 32

    def logits(model: Any, device: torch.device) -> torch.Tensor:
        pixels = project.pixels_of(n, model.transform.size[0]).to(device)
        distances = torch.linspace(0.5, 1.5, n, device=device)
        with torch.inference_mode():
            encoded = model.encode(pixels)
            # Each image against the next one but two.
            return model(encoded, encoded.roll(3, dims=0), distances).float().cpu()

    def build(precision: Any) -> Any:
        model = project.build_pairwise(name, size, precision, storage="float32")
        spread_weights(model)
        return model

    reference = build("fp32")
    reference.extractor.model.double()
    expected = logits(reference, torch.device("cpu"))
    context.row(f"{name}: deviation of the reference logits", "", float(expected.std()))
    prepared = {p: build(p).prepare_for_inference(context.device) for p in precisions(context)}
    for precision, model in prepared.items():
        error = relative_error(logits(model, context.device), expected)
        context.check(f"{name}, {precision}", error, BOUNDS[precision])
    for setting, is_allowed in (("TF32 everywhere", True), ("TF32 nowhere", False)):
        with tf32(is_allowed):
            error = relative_error(logits(prepared["fp32"], context.device), expected)
        context.check(f"{name}, fp32, {setting}", error, BOUNDS[f"fp32, {setting}"])


def spread_weights(model: Any) -> None:
    """Larger weights for an untrained model, so that its logits differ from pair to pair as a trained one's do."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer_name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                gain = 1.0 if layer_name.startswith("extractor.") else 2.0
                fan_in = layer.weight.shape[1]
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * gain / fan_in**0.5)


def check_extractor(kind: str, size: project.Sizes, context: Context) -> None:
    """Embeddings of one extractor."""
    reference = project.build_extractor(kind, size, "fp32")
    pixels = project.pixels_of(16, reference.transform.size[0])
    spread_weights(reference)
    state = copy.deepcopy(reference.state_dict())
    reference.model.double()
    with torch.inference_mode():
        expected = reference(pixels)
        for precision in precisions(context):
            extractor = project.build_extractor(kind, size, precision)
            extractor.load_state_dict(state)
            found = extractor.prepare_for_inference(context.device)(pixels.to(context.device))
            context.check(f"extractor {kind}, {precision}", relative_error(found, expected), BOUNDS[precision])


def check_search(context: Context) -> None:
    """Exact search against every distance in float64: the same items, in the same order, at the same distances."""
    n_queries, n_gallery, dim, n = (50, 2000, 32, 10) if context.is_quick else (500, 50_000, 384, 100)
    gallery, queries = (
        project.planted_embeddings(count, dim, seed=seed) for seed, count in enumerate((n_gallery, n_queries))
    )
    found = project.search(project.search_side(queries, n_gallery), project.search_side(gallery, 0), n)
    expected = torch.cdist(queries.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances, items = expected.float().sort(dim=1, stable=True)
    same = float((found.items == items[:, :n]).float().mean())
    context.row("search: places with the expected item", "share", same)
    context.check("search: places with another item", 1 - same, 1e-4)
    error = np.abs(found.distances - distances[:, :n].numpy()).max()
    context.check("search: largest difference of a distance", float(error), 1e-6)


def check_training(size: project.Sizes, context: Context) -> None:
    """What two steps of ConcatSiamese change in the weights, and their losses."""
    catalogue = project.photo_catalogue(context.work, size)
    n, n_steps = 16, 2

    def build(precision: Any) -> Any:
        model = project.build_pairwise("concat", size, precision)
        spread_weights(model)
        return model

    # Plain gradient descent: AdamW would divide tiny gradients by themselves, and make noise of their rounding large.
    task = project.training_task(
        catalogue, build("fp32"), context.work / f"check-{context.device.type}", n, epochs=1, lists_per_step=2,
        steps_per_epoch=n_steps, optimizer="sgd", lr=0.02, backbone_lr=0.02, weight_decay=0.0, clip_norm=0.0,
        loss="bce",
    )  # fmt: skip
    steps = project.steps_of(task)[:n_steps]
    reference = build("fp32")
    pixels = project.pixels_of(n, size.vit_size)
    start = flat_weights(reference)
    reference.extractor.model.double()
    losses = project.train(reference, steps, project.ImagesInMemory(pixels), task.config, torch.device("cpu"))
    change = flat_weights(reference) - start
    context.row("training: losses of the reference", "", ", ".join(f"{loss:.5f}" for loss in losses))
    for precision in precisions(context):
        model = build(precision).to(context.device)
        images = project.ImagesInMemory(pixels.to(context.device))
        found = project.train(model, steps, images, task.config, context.device)
        context.row(f"training, {precision}: losses", "", ", ".join(f"{loss:.5f}" for loss in found))
        error = float((flat_weights(model) - start - change).norm() / change.norm())
        context.check(f"training, {precision}: change of the weights", error, UPDATE_BOUNDS[precision])


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector in float64 on the processor."""
    return torch.cat([parameter.detach().double().cpu().reshape(-1) for parameter in model.parameters()])
