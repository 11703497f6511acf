"""The library compiled from the folder `cpu`: where it is, whether this machine can use it. Layer 1."""

import ctypes
import functools
import importlib.machinery
import importlib.metadata
import json
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor

from distributed_rerank.kernels.hardware import bf16_support
from distributed_rerank.kernels.sources import digest

UNIT = 32
"""Bfloat16 numbers in a row of a tile: widths that the kernels for transformers take are multiples of it."""


@functools.cache
def why_unavailable() -> str | None:
    """None where all compiled kernels can be used; else the reason."""
    if bf16_support(torch.device("cpu")) is None:
        return "this CPU has neither AMX nor AVX-512 BF16"
    if _library_path() is None:
        return (
            "distributed_rerank was installed without a C++ compiler, or its C++ sources changed since; "
            "install g++, then distributed_rerank again"
        )
    if not load_library().request_tiles():
        return "the system refuses AMX to this process"
    return None


def why_without_amx() -> str | None:
    """None where the kernels can be used and multiply by AMX; else the reason."""
    return why_unavailable() or (None if _has_amx() else "this CPU has no AMX")


@functools.cache
def has_vector_kernels() -> bool:
    """Whether those can be used that need AVX-512 only."""
    flags = torch.cpu.get_capabilities()
    needed = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
    return all(flags.get(flag, False) for flag in needed) and _library_path() is not None


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library's functions; where `why_unavailable` gives None all of them."""
    library = ctypes.CDLL(str(_library_path()))
    # Without the system's leave the first tile would end the process, so here and not where somebody may not come by.
    library.request_tiles()
    for scratch_size in (
        library.block_scratch,
        library.patches_scratch,
        library.attention_scratch,
        library.linear_scratch,
    ):
        scratch_size.restype = ctypes.c_size_t
    return library


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """A contiguous tensor's numbers, as the library takes them."""
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _library_path() -> Path | None:
    """The library compiled for this CPU beside this file; for sources that were only copied here, as `ray job submit`
    does, that of the installed package. None unless it was made from the sources that are here: others may take other
    arguments."""
    own = Path(__file__).parent
    name = "_amx" if _has_amx() else "_avx512"
    for folder in (own, _installed_folder()):
        file = folder / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        if file.exists() and _made_from(file) == digest(own / "cpu"):
            return file
    return None


def _has_amx() -> bool:
    return bf16_support(torch.device("cpu")) == "AMX"


def _made_from(file: Path) -> str:
    """The digest of the sources that the library was made from."""
    sources_digest = ctypes.CDLL(str(file)).sources_digest
    sources_digest.restype = ctypes.c_char_p
    return sources_digest().decode()


def _installed_folder() -> Path:
    """This folder in the installed package, whatever the search path says."""
    try:
        installed = importlib.metadata.distribution("distributed_rerank")
    except importlib.metadata.PackageNotFoundError:
        return Path(__file__).parent
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    is_editable = origin.get("dir_info", {}).get("editable", False)
    root = url2pathname(urlparse(origin["url"]).path) if is_editable else str(installed.locate_file(""))
    return Path(root) / "distributed_rerank" / "kernels"
