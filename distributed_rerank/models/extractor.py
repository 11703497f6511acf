"""Extractors: any timm model as a function from uint8 pixels to one float32 embedding per image.

The transform of the images is part of the extractor (timm's data config of the model, each field overridable). Mean and
deviation are applied on the device, so that images travel as bytes.
"""

import difflib
import functools
import inspect
import json
import logging
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from jaxtyping import Float32, UInt8
from timm.models import load_model_config_from_hf
from torch import Tensor, nn
from torch.nn import functional

from distributed_rerank.config.extractor import ExtractorConfig, python_literal
from distributed_rerank.config.own import is_own, load_own
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import BadInput
from distributed_rerank.models import inference, vit, weights
from distributed_rerank.models.precision import computing_in, resolve_precision
from distributed_rerank.storage.begun import ComputedWith
from distributed_rerank.storage.files import file_digest
from distributed_rerank.storage.locations import asking_hub
from distributed_rerank.tensors.hardware import bf16_support

logger = logging.getLogger(__name__)

_MORE_ARGUMENTS = frozenset({"features_only", "out_indices", "bn_tf", "bn_momentum", "bn_eps", "drop_connect_rate"})
"""Settings of networks that timm takes beside those of their classes."""
_LOADING_ARGUMENTS = frozenset({
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir",
    "pretrained_filter_fn", "feature_cfg", "feature_cls", "kwargs_filter", "scriptable", "exportable", "no_jit",
})  # fmt: skip
"""Say where something is loaded from, and are no settings of a network."""
MASK_TOKEN = "mask_token"
"""In checkpoints of networks pretrained on masked images, such as DINOv2; an embedding does not need it."""


class Extractor(nn.Module):
    """A timm model that takes pixels. `build_extractor` makes it; every choice is written out in `config`."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, config: ExtractorConfig, transform: InferenceTransform) -> None:
        super().__init__()
        self.model: Any = model
        self.config = config
        self.transform = transform
        self.dim = int(getattr(model, "head_hidden_size", 0) or model.num_features)
        self.is_plain_vit = vit.is_plain_vit(model)
        self.input_size = transform.size
        """Height and width of the images for the network."""
        self.has_narrow_maps = False
        """Whether any convolution of the network gives a map of one column and several rows."""
        self.register_buffer("mean", torch.tensor(transform.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).view(1, 3, 1, 1), persistent=False)

    def normalise_pixels(
        self, pixels: UInt8[Tensor, "image 3 height width"]
    ) -> Float32[Tensor, "image 3 height width"]:
        """(pixels / 255 - mean) / std, on the device of the pixels."""
        if pixels.is_cuda:  # in one kernel: each step of its own would read and write all numbers once more
            return torch.addcmul(-self.mean / self.std, pixels, 1 / (255 * self.std))
        return (pixels.to(torch.float32) / 255 - self.mean) / self.std

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Number format of the inputs and outputs of the network's layers on `device`."""
        return resolve_precision(self.config.precision, device, has_narrow_maps=self.has_narrow_maps)

    def computed_with(self, device: torch.device) -> ComputedWith:
        """What the results of this network on `device` are computed with."""
        is_auto = self.config.precision == "auto"
        return ComputedWith(
            device=device.type,
            precision=str(self.dtype_on(device)).removeprefix("torch."),
            auto_precision=str(resolve_precision("auto", device)).removeprefix("torch.") if is_auto else None,
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        )

    def pads_keys(self, device: torch.device) -> bool:
        """Whether to pad attention keys to a multiple of 16: 1.2 times faster with AMX and fused attention only."""
        is_fused = not torch.is_grad_enabled()  # vit.run_block
        return is_fused and self.dtype_on(device) == torch.bfloat16 and bf16_support(device) == "AMX"

    def features(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float32[Tensor, "image dim"]:
        """The network's pooled output, not normalised."""
        with computing_in(self.dtype_on(pixels.device), self.model, pixels.device) as dtype:
            images = self.normalise_pixels(pixels).to(dtype)
            if self.is_plain_vit:
                out = vit.class_token_embedding(self.model, images, self.pads_keys(pixels.device))
            else:
                out = self.model(images.contiguous(memory_format=torch.channels_last))
        return out.float()

    def forward(self, pixels: UInt8[Tensor, "image 3 height width"]) -> Float32[Tensor, "image dim"]:
        """Embeddings, of L2 norm 1 if `config.normalise`."""
        features = self.features(pixels)
        return functional.normalize(features, dim=1) if self.config.normalise else features

    def prepare_for_inference(self, device: torch.device | str) -> "Extractor":
        """Move to `device`, end training for good and use the fastest format for inference there. Returns itself.

        Raises BadInput for a precision that `device` does not have.
        """
        device = torch.device(device)
        dtype = self.dtype_on(device)
        self.to(device).eval().requires_grad_(False)
        inference.prepare(self.model, self._probe(device), dtype)
        return self

    def _probe(self, device: torch.device) -> Float32[Tensor, "1 3 height width"]:
        """A normalised image of noise, of the network's input size."""
        noise = torch.rand((1, 3, *self.input_size), generator=torch.Generator().manual_seed(0))
        return (noise.to(device) - self.mean) / self.std


def build_extractor(config: ExtractorConfig, stacked: int = 1) -> Extractor:
    """The extractor of `config`; with `stacked` = 2 its network takes two images, one above the other.

    Deterministic, and the global random state does not change. Raises BadInput for an unknown model, an argument or
    image size that it refuses, and weights that are absent, unreachable or do not fit; not for a precision that this
    machine does not have, since other machines may do the computing.
    """
    model: Any = _create(config)
    if config.weights not in (None, "none"):
        _load_file(model, config.weights)
    if is_own(config.network) and not isinstance(getattr(model, "num_features", None), int):
        model.num_features = _vector_size(model, config)
    if not isinstance(getattr(model, "num_features", None), int):
        raise _no_vector(config)
    transform = _transform(config, model)
    extractor = Extractor(model, _resolve(config, model, transform), transform)
    extractor.input_size = (stacked * transform.size[0], transform.size[1])
    _accept_size(extractor, extractor.input_size)
    return extractor.eval()


def _no_vector(config: ExtractorConfig) -> BadInput:
    args = ", ".join(f"{name}={value}" for name, value in config.args.items())
    return BadInput(
        f"extractor {config.name} with --extractor-args {args} gives no single vector an image; "
        "leave out features_only and an empty global_pool"
    )


def weights_digest(config: ExtractorConfig) -> str:
    """sha256 of the weights: of the local file, else of the fetched or initialised state dict."""
    if config.weights not in (None, "none"):
        return file_digest(config.weights)
    return weights.digest_of_state(_create(config).state_dict())


def _create(config: ExtractorConfig) -> nn.Module:
    """The timm model without classifier, with hub weights if config.weights is None, else initialised from the seed."""
    if is_own(config.network):
        return _create_own(config)
    _check_name(config.network)
    args = {name: python_literal(value) for name, value in config.args.items()}
    _check_args(config.network, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.extractor_seed)
        try:
            # A name on the hub is asked for its architecture.
            with asking_hub() if config.network.startswith(("hf-hub:", "hf_hub:")) else nullcontext():
                model = timm.create_model(config.network, pretrained=False, num_classes=0, **args)
        except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, OSError) as error:
            raise BadInput(
                f"extractor {config.name} with arguments {args} is refused by timm: {_line(error)}"
            ) from error
        if config.weights is not None:
            return model
        try:
            with asking_hub():
                return timm.create_model(config.network, pretrained=True, num_classes=0, **args)
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"the weights of extractor {config.name} could not be fetched ({_line(error)}); "
                "pass --extractor-weights FILE for a local file or --extractor-weights none for no training"
            ) from error


def _create_own(config: ExtractorConfig) -> nn.Module:
    """What a function or class of the user's makes: a module from normalised images to one vector each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.extractor_seed)
        model = load_own(config.network)(**{name: python_literal(value) for name, value in config.args.items()})
    if not isinstance(model, nn.Module):
        raise BadInput(f"extractor {config.name} makes a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _vector_size(model: nn.Module, config: ExtractorConfig) -> int:
    """How many numbers the user's module gives for an image."""
    size = config.image_size or 224
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with torch.no_grad():
            vectors: Any = model.eval()(torch.zeros(1, 3, height, width))
            n_images, dim = vectors.shape
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"extractor {config.name} gives no vector for an image of {height} x {width} pixels ({_line(error)}); it "
            "must turn [image, 3, height, width] into [image, dim]"
        ) from error
    assert n_images == 1, "one vector for one image"
    return int(dim)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _check_name(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name.partition(".")[0]):
        return
    close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the known ones"
    raise BadInput(f"extractor {name} is not a timm model; {hint}")


def _check_args(network: str, args: Mapping[str, Any]) -> None:
    """Raises BadInput for an argument that no network of the model's module takes, or that is no plain value.

    timm.create_model has more: a checkpoint to load, a config with an address to load from. These are not settings of a
    network, and a model folder that somebody else has made must not have them.
    """
    known = known_arguments(network)
    for name, value in args.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "leave it out"
            raise BadInput(f"extractor {network} takes no argument {name}; {hint}")
        if not _is_plain(value):
            raise BadInput(f"extractor argument {name}={value!r} must be a number, a word, or a tuple of such")


@functools.cache
def known_arguments(network: str) -> frozenset[str]:
    """Names of the arguments that the classes of the network's timm module take; of all modules for a hub's name."""
    name = network.partition(".")[0]
    modules = [timm.model_entrypoint(name).__module__] if timm.is_model(name) else timm.list_modules()
    found = set(_MORE_ARGUMENTS)
    for module in modules:
        path = module if module.startswith("timm.") else f"timm.models.{module}"
        for kind in vars(sys.modules[path]).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("timm.models"):
                found |= set(inspect.signature(kind.__init__).parameters)
    return frozenset(found - _LOADING_ARGUMENTS - {"self", "args", "kwargs"})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _load_file(model: Any, path: str) -> None:
    """Load a backbone's checkpoint, without its classifier or training criterion where the model has none."""
    own = model.state_dict()
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    parts = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    absent = [part for part in (*parts, "criterion") if not any(name.startswith(f"{part}.") for name in own)]
    known = [*own, *(f"{part}.{kind}" for part in absent for kind in ("weight", "bias")), MASK_TOKEN]
    written = weights.read_state_dict(path)
    state = weights.without_parts(weights.strip_wrappers(written, known), absent)
    if MASK_TOKEN not in own:
        state.pop(MASK_TOKEN, None)
    weights.load_exactly(model, state, path)
    # OML saves an extractor whose network is `model`; its pooling with gem_p has no parameters, so no file tells it.
    is_of_oml = any(name.startswith(("model.", "extractor.model.")) for name in written)
    if is_of_oml and getattr(getattr(model, "global_pool", None), "pool_type", "") == "avg":
        logger.warning(
            "%s: POOLED BY AVERAGE. If OML trained it with gem_p (GeM pooling), which no file tells, these are other "
            "embeddings: give an extractor of your own (--extractor package.module:function)", path,
        )  # fmt: skip


def _transform(config: ExtractorConfig, model: Any) -> InferenceTransform:
    """timm's data config of the model, overridden by the fields that `config` sets."""
    data = timm.data.resolve_data_config({}, model=model)
    size = config.image_size or _native_size(model)
    height, width = (size, size) if isinstance(size, int) else size
    return InferenceTransform(
        size=(int(height), int(width)),
        resize=config.resize or ("square" if data["crop_mode"] == "squash" else "crop"),
        crop_pct=config.crop_pct or data["crop_pct"],
        interpolation=config.interpolation or data["interpolation"],
        mean=_three(config.mean or data["mean"]),
        std=_three(config.std or data["std"]),
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _native_size(model: Any) -> tuple[int, int]:
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return built_for or timm.data.resolve_data_config({}, model=model)["input_size"][1:]


def _resolve(config: ExtractorConfig, model: Any, transform: InferenceTransform) -> ExtractorConfig:
    """The config with the transform written out and a name that timm knows without asking the hub."""
    name, args = config.network, dict(config.args)
    source, _, identifier = name.partition(":")
    if identifier and not is_own(name):
        if source == "local-dir":
            described = json.loads((Path(identifier) / "config.json").read_text())
            name, hub_args = described["architecture"], described.get("model_args")
        else:
            with asking_hub():
                _, name, hub_args = load_model_config_from_hf(identifier)
        # The source may fix the size of the position table; the bare name would build the default one.
        size = {"img_size": _native_size(model)} if hasattr(model, "pos_embed") else {}
        args = {**(hub_args or {}), **size, **args}
    return replace(
        config,
        name=name,
        args=args,
        image_size=transform.size,
        resize=transform.resize,
        crop_pct=transform.crop_pct,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
    )


def _accept_size(extractor: Extractor, size: tuple[int, int]) -> None:
    """Adapt the network to images of `size` and try one, since some networks take one size only.

    Sets `has_narrow_maps`. The trial is in float32 for any precision: another machine may compute with the extractor.
    """
    model = extractor.model
    is_narrow: list[bool] = []

    def note_map(module: nn.Module, inputs: object, output: Tensor) -> None:
        is_narrow.append(output.shape[-1] == 1 and output.shape[-2] > 1)

    hooks = [m.register_forward_hook(note_map) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        if not extractor.is_plain_vit and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
        image = torch.zeros(1, 3, *size)
        with torch.no_grad():
            if extractor.is_plain_vit:
                embedding = vit.class_token_embedding(extractor.eval().model, image, pad_keys=False)
            else:
                embedding = extractor.eval().model(image)
        if not isinstance(embedding, Tensor) or embedding.shape != (1, extractor.dim):
            raise _no_vector(extractor.config)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"extractor {extractor.config.name} does not accept images of {size[0]} x {size[1]} pixels "
            f"({_line(error)}); choose another --image-size or another extractor"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    extractor.has_narrow_maps = any(is_narrow)
