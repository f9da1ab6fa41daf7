"""What this machine, this build and these packages are: for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

import fastuda
from fastuda.ops._backends import BACKENDS, CUDA_ERROR, EXTENSION_ERROR, backends

PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors", "tensorboard", "nvidia-dali-cuda130", "apex")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> str:
    """Versions, devices, the extension, and every op with what can run it here."""
    lines = [f"fastuda {fastuda.__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package} {_version(package)}" for package in PACKAGES]
    lines.append(f"CPU: {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            lines.append(f"GPU {index}: {gpu.name}, {gpu.total_memory >> 20} MiB, sm_{gpu.major}{gpu.minor}")
    else:
        lines.append(f"GPU: none that torch can use (built for CUDA {torch.version.cuda})")
    lines.append(f"C++ extension: {EXTENSION_ERROR or 'loaded'}")
    lines.append(f"CUDA kernels: {CUDA_ERROR or 'loaded'}")
    lines += [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("FASTUDA_")]
    lines.append("ops:")
    for op in BACKENDS:
        lines.append(f"  {op}")
        lines += [f"    {row.name:10} {row.reason}" for row in backends(op)]
    return "\n".join([*lines, f"command: {' '.join(sys.argv)}"]) + "\n"
