"""The machine, the build and the package versions, for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

import fastuda
from fastuda.ops._backends import BACKENDS, CUDA_ERROR, EXTENSION_BUILD, EXTENSION_ERROR, backends
from fastuda.system.precision import support

PACKAGES = (
    "torch", "triton", "numpy", "pillow", "safetensors", "tensorboard", "nvidia-dali-cuda130", "apex",
    "transformers", "onnx", "onnxruntime", "opencv-python-headless",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, Any]:
    """Versions, devices, the extensions, and for every op the backends that can run it here, as plain
    types."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(len(gpus)))]
    return {
        "fastuda": fastuda.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "precision": {
            str(at): {half: support(half, at.type, at.index)._asdict() for half in ("bf16", "fp16")}
            for at in devices
        },
        "gpus": [{"name": g.name, "mib": g.total_memory >> 20, "sm": f"{g.major}{g.minor}"} for g in gpus],
        "built_for_cuda": torch.version.cuda,
        "extension": EXTENSION_ERROR or "loaded",
        "extension_build": EXTENSION_BUILD,
        "cuda_kernels": CUDA_ERROR or "loaded",
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith("FASTUDA_")},
        "ops": {op: [row._asdict() for row in backends(op)] for op in BACKENDS},
        "command": " ".join(sys.argv),
    }


def environment() -> str:
    """The facts as text."""
    values = facts()
    lines = [f"fastuda {values['fastuda']}", f"python {values['python']} on {values['platform']}"]
    lines += [f"{package} {version}" for package, version in values["packages"].items()]
    lines.append(f"CPU: {values['cpu']['cores']} cores, {values['cpu']['capability']}")
    for index, gpu in enumerate(values["gpus"]):
        lines.append(f"GPU {index}: {gpu['name']}, {gpu['mib']} MiB, sm_{gpu['sm']}")
    if not values["gpus"]:
        lines.append(f"GPU: none that torch can use (built for CUDA {values['built_for_cuda']})")
    for device, halves in values["precision"].items():
        lines.append(f"--amp on {device}: {'; '.join(half['reason'] for half in halves.values())}")
    build = f" ({values['extension_build']})" if values["extension_build"] else ""
    lines += [f"C++ extension: {values['extension']}{build}", f"CUDA kernels: {values['cuda_kernels']}"]
    lines += [f"{key}={value}" for key, value in values["variables"].items()]
    lines.append("ops:")
    for op, rows in values["ops"].items():
        lines.append(f"  {op}")
        lines += [f"    {row['name']:10} {row['reason']} ({row['why']})" for row in rows]
    return "\n".join([*lines, f"command: {values['command']}"]) + "\n"
