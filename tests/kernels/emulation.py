"""The CUDA kernels compiled for the CPU, thread by thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))


def at(x: torch.Tensor | None) -> ctypes.c_void_p:
    """Where the elements of ``x`` lie."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def compiled(folder: Path) -> ctypes.CDLL:
    """The kernels: blocks one after the other, threads from barrier to barrier."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / "kernels.so"
    options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-ffp-contract=fast"]
    subprocess.run(
        [compiler, *options, "-x", "c++", "-include", HERE / "emulated_cuda.h", *SOURCES, "-o", library],
        check=True,
    )
    return ctypes.CDLL(str(library))
