"""Reading state dicts from files and fitting them to a network, or saying exactly why they do not fit."""

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_rerank.data.manifests import check_paths
from distributed_rerank.errors import BadInput

WRAPPERS = ("module.", "model.", "extractor.", "backbone.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .ckpt file, on the CPU.

    One nested under `state_dict` or `model` is unwrapped.

    Raises:
        BadInput: absent, of another kind, unreadable, holding anything that would have to be unpickled as code, or
            a file of a finished folder that has changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"weights file {path} does not exist")
    check_paths([path])
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise BadInput(f"weights file {path} must end in .safetensors, .pth, .pt, .ckpt or .bin")
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
    ) as error:
        raise BadInput(f"weights file {path} cannot be read as plain tensors: {str(error).splitlines()[0]}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"weights file {path} holds no state dict (names and tensors); save model.state_dict() instead")
    return dict(state)


def strip_wrappers(state: Mapping[str, Tensor], known: Iterable[str]) -> dict[str, Tensor]:
    """Names without the prefixes of DataParallel, Lightning and OML, as far as that leads to a `known` name."""
    known = set(known)
    return {_unwrapped(name, known): value for name, value in state.items()}


def _unwrapped(name: str, known: set[str]) -> str:
    short = name
    while short not in known:
        prefix = next((w for w in WRAPPERS if short.startswith(w)), None)
        if prefix is None:
            return name
        short = short.removeprefix(prefix)
    return short


def without_parts(state: Mapping[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """The state without the entries of the modules named in `parts` (a classifier, a criterion)."""
    prefixes = tuple(f"{part}." for part in parts)
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` in `module`; every name and shape must agree.

    Counters of batch normalisation may be absent.

    Raises:
        BadInput: naming `source` and the first missing, unexpected and mis-shaped entries.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if names
    ]
    if problems:
        raise BadInput(f"weights {source} do not fit the architecture: {'; '.join(problems)}; name their own model")
    module.load_state_dict(dict(state), strict=False)


def digest_of_state(state: Mapping[str, Any]) -> str:
    """sha256 (hex) of the names, types, shapes and values of a state dict, whatever the order of its entries."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
