"""Every GPU kernel once on small inputs, for compute-sanitizer.

``python -m tests.gpu.small triton|cuda DTYPE``
"""

from __future__ import annotations

import sys

import torch

from tests.cases import every
from tests.gpu.kernels import DEVICE, has


def main(backend: str, dtype: str) -> None:
    """Forward and backward."""
    for op, _, x, function in every("samples", DEVICE):
        if has(op, backend):
            leaf = x.to(DEVICE, getattr(torch, dtype)).requires_grad_()
            value = function(leaf, backend)
            if value.requires_grad:
                torch.autograd.grad(value.float().sum(), leaf)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
