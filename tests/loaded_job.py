"""A job file as a module, for tests of its arguments and functions."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

JOBS = Path(__file__).resolve().parents[1] / "jobs"


def load_job(name: str) -> ModuleType:
    """The module of jobs/<name>.py; jobs is no package."""
    full_name = f"job_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, JOBS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]
