"""The compiled part of the package; all else is in pyproject.toml.

The same sources are compiled twice: for CPUs with AMX and for those with AVX-512 alone. Without a C++ compiler, or on
another processor than x86, the package is installed without them and says so where they would be used. They have no
Python in them (ctypes loads them), so no headers of Python are needed. The digest of the sources is compiled in, so
that a library is not used with sources that were changed since.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("distributed_rerank/kernels/cpu")
digest = runpy.run_path("distributed_rerank/kernels/sources.py")["digest"]


def library(name: str, *flags: str) -> Extension:
    """The sources compiled with these flags besides those for AVX-512."""
    return Extension(
        f"distributed_rerank.kernels.{name}",
        sources=sorted(map(str, SOURCES.glob("*.cpp"))),
        depends=sorted(map(str, SOURCES.glob("*.h"))),
        define_macros=[("SOURCES_DIGEST", f'"{digest(SOURCES)}"')],
        extra_compile_args=[
            "-O3", "-std=c++17", "-fno-math-errno",
            "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", *flags,
            "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # of gcc's own headers
        ],
        language="c++",
        optional=True,
    )  # fmt: skip


setup(ext_modules=[library("_amx", "-mamx-tile", "-mamx-bf16"), library("_avx512")])
