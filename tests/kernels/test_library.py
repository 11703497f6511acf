"""Where compiled libraries are found: beside their sources or, if these were only copied, in the installed package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_rerank
from distributed_rerank.kernels import library
from distributed_rerank.kernels.sources import digest

NEEDS_KERNELS = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
PACKAGE = Path(distributed_rerank.__file__).parent
PRINT_WHAT_IS_FOUND = """
import json
from distributed_rerank.kernels import library
print(json.dumps([library.__file__, str(library._library_path()), library.why_unavailable()]))
"""


def copy_sources(folder: Path) -> Path:
    """The package as `ray job submit` uploads it; returns the folder of its kernels."""
    copied = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copied / "kernels"


def found_with(*search_path: Path) -> tuple[Path, Path, str | None]:
    """The module, the library and the reason, in a fresh process that looks in `search_path` first: all are kept once
    they were looked up."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search_path))}
    command = [sys.executable, "-c", PRINT_WHAT_IS_FOUND]
    done = subprocess.run(command, env=env, cwd=search_path[0], capture_output=True, text=True, check=True)
    module, path, reason = json.loads(done.stdout)
    return Path(module), Path(path), reason


@NEEDS_KERNELS
def test_copied_sources_use_the_installed_library(tmp_path):
    kernels = copy_sources(tmp_path)
    module, path, reason = found_with(tmp_path)
    assert module.parent == kernels
    assert path == library._library_path()
    assert reason is None


@NEEDS_KERNELS
def test_copied_sources_use_the_library_of_a_package_that_is_not_editable(tmp_path):
    copied, installed = tmp_path / "copied", tmp_path / "installed"
    copy_sources(copied)
    expected = copy_sources(installed) / library._library_path().name
    shutil.copy(library._library_path(), expected)
    (installed / "distributed_rerank-1.dist-info").mkdir()
    (installed / "distributed_rerank-1.dist-info" / "METADATA").write_text("Name: distributed_rerank\nVersion: 1\n")
    assert found_with(copied, installed)[1:] == (expected, None)


def test_library_beside_its_sources_is_theirs():
    """Where this fails the sources were changed since it was made: `make setup`."""
    built = [file for name in ("_amx", "_avx512") for file in (PACKAGE / "kernels").glob(f"{name}*.so")]
    if not built:
        pytest.skip("no compiled kernels")
    if not torch.cpu.get_capabilities().get("avx512_f"):
        pytest.skip("no AVX-512, which loading them needs")
    assert [library._made_from(file) for file in built] == 2 * [digest(PACKAGE / "kernels" / "cpu")]
    assert library._library_path() in built


@NEEDS_KERNELS
@pytest.mark.parametrize("is_beside", [False, True], ids=["installed", "beside the sources"])
def test_library_of_other_sources_is_not_used(tmp_path, is_beside):
    """It would take other arguments, or give other results than the rest of the workers."""
    kernels = copy_sources(tmp_path)
    if is_beside:
        shutil.copy(library._library_path(), kernels)
    header = kernels / "cpu" / "products.h"
    header.write_text(header.read_text() + "// changed\n")
    _, path, reason = found_with(tmp_path)
    assert path == Path("None")
    assert "install g++, then distributed_rerank again" in (reason or "")


@pytest.mark.parametrize(
    ("support", "reason", "reason_without_amx"),
    [
        (None, "this CPU has neither AMX nor AVX-512 BF16", "this CPU has neither AMX nor AVX-512 BF16"),
        pytest.param("AVX-512 BF16", None, "this CPU has no AMX", marks=NEEDS_KERNELS),
    ],
)
def test_reasons_name_what_the_processor_lacks(monkeypatch, support, reason, reason_without_amx):
    monkeypatch.setattr(library, "bf16_support", lambda device: support if device == torch.device("cpu") else None)
    why_unavailable = library.why_unavailable.__wrapped__
    assert why_unavailable() == reason
    monkeypatch.setattr(library, "why_unavailable", why_unavailable)
    assert library.why_without_amx() == reason_without_amx
