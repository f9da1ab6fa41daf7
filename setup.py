"""Build script: the package map and the optional C++ extension.

``FASTUDA_BUILD`` decides what is compiled: ``auto`` (default: the CPU extension where a compiler and torch
are found, and a working pure-Python install where they are not), ``cpu`` (a failed build is an error),
``cuda`` (CPU and CUDA, a failed build is an error) or ``none``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
BUILD = os.environ.get("FASTUDA_BUILD", "auto")

if BUILD not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"FASTUDA_BUILD={BUILD!r}: choose auto, cpu, cuda or none")


def extension() -> dict:
    """setup() arguments that build ``fastuda._C``, or nothing when it is not wanted or cannot be built."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cpp"))
    if BUILD == "none" or not sources:
        return {}
    if BUILD == "auto" and shutil.which(os.environ.get("CXX", "g++")) is None:
        print("fastuda: no C++ compiler found, building without the extension", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if BUILD != "auto":
            raise
        print("fastuda: torch is not importable here, building without the extension", file=sys.stderr)
        return {}
    module = CppExtension(
        "fastuda._C",
        sources,
        # contraction: -std=c++20 would switch fused multiply-adds off
        extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"],
        extra_link_args=["-fopenmp"],
        optional=BUILD == "auto",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


packages = find_packages(include=["fastuda", "fastuda.*"])
packages += ["fastuda.kernels"] + ["fastuda.kernels." + name for name in find_packages("kernels")]

setup(
    packages=packages,
    package_dir={"fastuda": "fastuda", "fastuda.kernels": "kernels"},
    package_data={"fastuda": ["py.typed", "configs/*.yaml"]},
    **extension(),
)
