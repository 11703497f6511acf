"""The library compiled for AMX, where the CPU has none: its instructions are run as Intel defines them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_rerank.kernels import library

TESTS = Path(__file__).parents[1]
FILES = ("kernels/test_transformer.py", "kernels/test_training.py", "models/test_compiled_vit.py")
# All kinds of tests, but few of their numbers of tokens: some 30 s instead of 110.
SMALL = (
    "not 197 and not 50 and not 33 and not 34 and not -1] and not -2] and not -15] and not -16] and not -32]"
    " and not depth and not threads_that_run and (not memory_around or 17-3-0)"
)


@pytest.mark.slow
@pytest.mark.skipif(library.why_without_amx() is None, reason="this CPU has AMX: the other tests of the kernels use it")
@pytest.mark.skipif(not library.has_vector_kernels(), reason="no AVX-512, or no compiled kernels")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_library_for_amx_passes_the_tests_of_the_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "amx_by_definition", "-p", "no:cacheprovider", "-k", SMALL]
    env = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        env.pop(variable, None)
    done = subprocess.run(
        command + [str(TESTS / file) for file in FILES], env=env, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    products, passed = (
        int(re.search(pattern, done.stdout).group(1)) for pattern in (r"(\d+) products", r"(\d+) passed")
    )
    assert products > 500_000
    assert passed > 250
