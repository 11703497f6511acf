"""The compiled part of the package; all else is in pyproject.toml.

Without a C++ compiler, or on another processor than x86, the package is installed without it and says so where it would
be used. It has no Python in it (ctypes loads it), so no headers of Python are needed. The digest of its sources is
compiled in, so that a library is not used with sources that were changed since.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("distributed_rerank/kernels/cpu")
digest = runpy.run_path("distributed_rerank/kernels/sources.py")["digest"]

setup(
    ext_modules=[
        Extension(
            "distributed_rerank.kernels._cpu",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            define_macros=[("SOURCES_DIGEST", f'"{digest(SOURCES)}"')],
            extra_compile_args=[
                "-O3", "-std=c++17", "-fno-math-errno",
                "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
                "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # of gcc's own headers
            ],
            language="c++",
            optional=True,
        )
    ]
)  # fmt: skip
