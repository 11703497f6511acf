"""A pairwise model as a folder: config.json + model.safetensors. Nothing is ever unpickled.

The folder is complete: it holds the backbone's weights and every choice of the image transform, so that loading needs
neither the internet nor the extractor's own weights.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.own import is_own, load_own, refuse_foreign
from distributed_rerank.config.pairwise import PairwiseConfig, pairwise_config, pairwise_name
from distributed_rerank.data.trained_on import TRAINED_ON, read_trained_on
from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.distance_siamese import DistanceSiamese
from distributed_rerank.models.extractor import Extractor
from distributed_rerank.models.pairwise import PairwiseModel
from distributed_rerank.models.split_siamese import SplitSiamese
from distributed_rerank.models.token_siamese import TokenSiamese
from distributed_rerank.storage.files import write_bytes
from distributed_rerank.storage.locations import asking_hub
from distributed_rerank.storage.manifests import MANIFEST, check_files

SCHEMA_VERSION = 2
MODELS: Mapping[str, type[PairwiseModel]] = {
    "concat": ConcatSiamese,
    "split": SplitSiamese,
    "token": TokenSiamese,
    "distance": DistanceSiamese,
}
"""By the name on the command line and in config.json."""


def build_model(config: PairwiseConfig) -> PairwiseModel:
    """The untrained model of `config`: each time the same weights, also of a model that draws its own."""
    kind: Any = model_class(pairwise_name(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


def model_class(name: str) -> type[PairwiseModel]:
    """The class of one of our models, or of your own. Raises BadInput for what is no pairwise model."""
    found = load_own(name) if is_own(name) else MODELS[name]
    if not (isinstance(found, type) and issubclass(found, PairwiseModel)):
        raise BadInput(f"{name} is no pairwise model; derive it from distributed_rerank.models.pairwise.PairwiseModel")
    return found


def model_name(model: nn.Module) -> str:
    """The model's name in config.json and on the command line. Raises BadInput for a class that is not ours."""
    for name, kind in MODELS.items():
        if type(model) is kind:
            return name
    name = getattr(getattr(model, "config", None), "model_name", "")
    if is_own(name) and type(model) is model_class(name):
        return name
    raise BadInput(f"{type(model).__name__} is no pairwise model that can be saved; known are {', '.join(MODELS)}")


def save_model(model: PairwiseModel, folder: str | Path) -> Path:
    """Write `model` to `folder`, which is created or has its two files replaced one after the other. Returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_bytes(folder / "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": model_name(model),
        "config": dataclasses.asdict(model.config),
        "bytes_per_image": model.bytes_per_image,
        "gflop_per_pair": round(model.gflop_per_pair(), 6),
    }
    write_bytes(folder / "config.json", (json.dumps(content, indent=2) + "\n").encode())
    return folder


def save_extractor(extractor: Extractor, path: str | Path, seen_labels: Iterable[str] = ()) -> Path:
    """Write the weights of the extractor's network, by timm's names, as a file for `ExtractorConfig.weights`.

    The file holds the digests of the labels that they were trained on; `weights.seen_labels` reads them.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in extractor.model.state_dict().items()}
    seen = {weights.SEEN_LABELS: " ".join(sorted(seen_labels))}
    write_bytes(path, with_sorted_metadata(safetensors.torch.save(state, metadata={"format": "pt", **seen})))
    return Path(path)


def with_sorted_metadata(file: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order; the library writes them in an order of chance."""
    # Eight bytes have the length of the header, which is JSON; then come the tensors, at places counted from there.
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def load_model(folder: str | Path) -> PairwiseModel:
    """The model that `save_model` wrote to `folder` or `push_model` sent to `hf-hub:owner/name`, in evaluation mode.

    The files of a finished training folder, its chain included, are compared with the manifest; a folder without one
    (from the hub) is taken as it is. Raises BadInput for a folder that does not exist, lacks a file, has a changed file
    or is not a saved model, and for weights that do not fit.
    """
    path = local_folder(folder)
    check_files(path, ["config.json", "chain.json", "model.safetensors", TRAINED_ON])
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise BadInput(f"{folder} is no saved pairwise model: it has no {name}; give a folder that `train` wrote")
    try:
        content = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise BadInput(f"{path / 'config.json'} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise BadInput(f"{path / 'config.json'} has another schema_version than {SCHEMA_VERSION}; train again")
    name = str(content.get("model"))
    if name not in MODELS and not is_own(name):
        raise BadInput(f"{path / 'config.json'} names the model {name!r}; known are {', '.join(MODELS)}")
    if is_own(name):
        refuse_foreign(name, str(path / "config.json"))
    model = build_model(config_from_json(pairwise_config(name), content["config"]))
    weights.load_exactly(model, weights.read_state_dict(path / "model.safetensors"), str(path / "model.safetensors"))
    model.trained_on = read_trained_on(path)
    return model.eval()


def config_from_json(kind: type, values: Mapping[str, Any]) -> Any:
    """A model's config from its dataclasses.asdict, set to load no other weights."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise BadInput(f"config.json has the unknown field {unknown[0]!r} of {kind.__name__}; another version wrote it")
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "extractor" in plain:
        plain["extractor"] = config_from_json(ExtractorConfig, plain["extractor"])
    if kind is ExtractorConfig:
        name = str(plain.get("name"))
        if is_own(name):
            refuse_foreign(name, "config.json")
        elif not timm.is_model(name.partition(".")[0]):
            raise BadInput(f"config.json names the extractor {plain.get('name')!r}, which is no timm model")
        plain["weights"] = "none"
    elif "pairwise_weights" in known:
        plain["pairwise_weights"] = None
    return kind(**plain)


def push_model(folder: str | Path, repo_id: str) -> str:
    """Send a saved folder to the Hugging Face hub as `repo_id`, created if absent; returns the commit's address.

    Weights, config, chain and card go there, the manifest does not: it lists files that stay here.
    """
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        allow_patterns=["*.json", "*.safetensors", "*.md"],
        ignore_patterns=[MANIFEST],
    )
    return str(commit)


def local_folder(folder: str | Path) -> Path:
    """The folder itself, or a local copy of `hf-hub:owner/name`: weights, config, chain and card.

    Raises BadInput if the hub does not answer or has no such model.
    """
    name = str(folder)
    if not name.startswith("hf-hub:"):
        return Path(folder)
    try:
        patterns = ["*.json", "*.safetensors", "*.md"]
        repo_id = name.removeprefix("hf-hub:")
        with asking_hub():
            return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=[MANIFEST]))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{name} could not be fetched from the hub: {str(error).splitlines()[0]}; give a local folder"
        ) from error
