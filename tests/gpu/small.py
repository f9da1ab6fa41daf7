"""Every GPU kernel once on small inputs, for compute-sanitizer: ``python -m tests.gpu.small triton|cuda``."""

from __future__ import annotations

import sys

import torch

import fastuda.ops as F
from tests.gpu.cases import CASES, CUDA, DEVICE, TRITON, classes_of, normal


def main(backend: str) -> None:
    """Forward and backward in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in sorted({"triton": TRITON, "cuda": CUDA}[backend] & set(CASES)):
            _, x, function = CASES[name]
            leaf = x.to(DEVICE, dtype).requires_grad_()
            value = function(leaf, backend)
            torch.autograd.grad(value.float().sum(), leaf)
        x = normal(300, 40).to(DEVICE, dtype)
        F.class_statistics(x, classes_of(300), 19, backend=backend)
        F.upsample_confusion(normal(2, 19, 11, 17).to(DEVICE, dtype), classes_of(2, 61, 93), backend=backend)
        if backend == "triton":
            wide = normal(1, 300, 256).to(DEVICE, dtype)
            F.cycle_match(wide, wide[:, :130], backend=backend)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
