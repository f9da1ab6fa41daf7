"""Which ops have kernels for a GPU."""

from __future__ import annotations

import torch

from fastuda.ops._backends import BACKENDS

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def has(op: str, backend: str) -> bool:
    """Whether there is a kernel of ``op``, built or not."""
    return any(row.name == backend for row in BACKENDS[op])
