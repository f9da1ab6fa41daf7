"""Which ops have kernels for a GPU, as the sources say."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastuda.ops._backends import BACKENDS

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).resolve().parents[2]
CUDA = {
    operator
    for path in (ROOT / "csrc" / "cuda").iterdir()
    if path.suffix in (".cpp", ".cu")
    for operator in re.findall(r'impl\("(\w+)\.cuda"', path.read_text())
}


def has(op: str, backend: str) -> bool:
    """Whether there is a kernel of ``op``, built or not."""
    row = next((row for row in BACKENDS[op] if row.name == backend), None)
    return row is not None and (backend != "cuda" or CUDA.issuperset(row.operators))
