"""A plugin of pytest: the kernels for AMX run on a CPU that has AVX-512 only, each of their instructions by definition.

By hand, all of it, in some two minutes:

    PYTHONPATH=tests python -m pytest -p amx_by_definition tests/kernels tests/models/test_compiled_vit.py
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "kernels" / "amx_by_definition.cpp"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-mavx512f", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")


@pytest.hookimpl(trylast=True)  # after that of faulthandler, which would take the signals
def pytest_configure(config: pytest.Config) -> None:
    """Compiles the handler, installs it and lets the package see a CPU with AMX."""
    folder = Path(tempfile.mkdtemp(prefix="amx_by_definition-"))
    config.add_cleanup(lambda: _remove(folder))
    compiled = folder / "handler.so"
    subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(compiled)], check=True)
    config.amx_handler = ctypes.CDLL(str(compiled))
    if config.amx_handler.install() != 0:
        raise OSError("the handler of SIGILL was refused")
    from distributed_rerank.kernels import library

    library.bf16_support = lambda device: "AMX"
    library.why_unavailable = lambda: None  # the system has no AMX that it could give leave to


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which the library for AMX took no part has shown nothing."""
    has_run = not session.config.option.collectonly
    if has_run and _counts(session.config)[0] == 0 and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How much was computed by definition."""
    products, loads, stores = _counts(config)
    terminalreporter.write_line(f"AMX by definition: {products} products, {loads} loads, {stores} stores of tiles")


def _counts(config: pytest.Config) -> list[int]:
    counts = (ctypes.c_uint64 * 3)()
    config.amx_handler.counts(counts)
    return list(counts)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
