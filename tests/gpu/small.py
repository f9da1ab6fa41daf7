"""Every GPU kernel once on small inputs, for compute-sanitizer: ``python -m tests.gpu.small triton|cuda``."""

from __future__ import annotations

import sys

import torch

from tests.cases import every
from tests.gpu.kernels import DEVICE, has


def main(backend: str) -> None:
    """Forward and backward in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for op, _, x, function in every("samples", DEVICE):
            if has(op, backend):
                leaf = x.to(DEVICE, dtype).requires_grad_()
                value = function(leaf, backend)
                if value.requires_grad:
                    torch.autograd.grad(value.float().sum(), leaf)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
