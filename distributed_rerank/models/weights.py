"""Read state dicts from files and load them into a network, or say exactly why they do not fit."""

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_rerank.errors import BadInput
from distributed_rerank.storage.manifests import check_paths

WRAPPERS = ("module.", "model.", "extractor.", "backbone.", "_orig_mod.")
NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema", "ema_state_dict", "model_ema")
"""Keys under which training loops store a state dict, in the order in which they are looked for."""

SEEN_LABELS = "seen_labels"
"""In the metadata of a safetensors file: digests of the labels that its network was trained on."""


def label_digest(name: str) -> str:
    """What stands for a label's name in a file of weights, which may be shared."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def seen_labels(path: str | Path | None) -> frozenset[str]:
    """Digests of the labels that the weights in this file were trained on, as far as it says so."""
    if path is None or not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return frozenset()
    with safetensors.safe_open(path, "pt") as content:
        return frozenset((content.metadata() or {}).get(SEEN_LABELS, "").split())


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .ckpt or .bin file, on the CPU.

    A state dict nested under one of `NESTED` is unwrapped. Raises BadInput for a file that is absent, of another kind
    or unreadable, that would need code to be unpickled, or that belongs to a finished folder and has changed.
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
    for wrapper in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, Mapping) else type(state).__name__
        raise BadInput(
            f"weights file {path} holds no state dict (names and tensors) but {keys}; save model.state_dict() instead"
        )
    return dict(state)


def strip_wrappers(state: Mapping[str, Tensor], known: Iterable[str]) -> dict[str, Tensor]:
    """The state without prefixes of wrappers, for names that become `known` without them.

    Wrappers are those of DataParallel, torch.compile, Lightning and OML, and any prefix that all names share. Raises
    BadInput where two names would become one.
    """
    known = set(known)
    shared = _shared_prefix(state, known)
    short = {name: _unwrapped(name.removeprefix(shared), known) for name in state}
    first: dict[str, str] = {}
    for name, own in short.items():
        if own in first:
            raise BadInput(
                f"weights: {first[own]} and {name} both become {own}; save model.state_dict() of the backbone"
            )
        first[own] = name
    return {short[name]: value for name, value in state.items()}


def _shared_prefix(state: Mapping[str, Tensor], known: set[str]) -> str:
    """The shortest dotted prefix of all names without which a name, or its unwrapped form, is known; else ""."""
    prefix = ""
    while state:
        rests = [name.removeprefix(prefix) for name in state]
        if any(_unwrapped(rest, known) in known for rest in rests):
            return prefix
        heads = {rest.partition(".")[0] for rest in rests}
        if len(heads) != 1 or any("." not in rest for rest in rests):
            return ""
        prefix += f"{heads.pop()}."
    return ""


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
    """Load `state` into `module`; names and shapes must agree (counters of batch normalisation may be absent).

    Raises BadInput that names `source` and the first missing, unexpected and mis-shaped entries.
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
    """sha256 of the names, types, shapes and values of a state dict, in hexadecimal, for any order of its entries."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
