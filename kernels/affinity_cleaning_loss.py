"""The sum of the inner products of neighbouring pixels and its gradient, in one pass; no map is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels import local_affinity as affinity
from fastuda.kernels._common import on_device
from fastuda.kernels.local_affinity import inside


def affinity_cleaning_loss_fwd(p: Tensor, neighbours: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """``(sum over pixels and neighbours of the inner products, its gradient or [0])`` in float32; the
    low-level op of the same name."""
    p = p.contiguous()
    batch, classes, height, width = p.shape
    grid = (batch * classes * triton.cdiv(height * width, affinity.BLOCK),)
    grad = torch.empty(p.shape if gradient else (0,), dtype=torch.float32, device=p.device)
    partial = torch.empty(grid, dtype=torch.float32, device=p.device)
    with on_device(p):
        if p.numel():
            options = dict(GRADIENT=gradient, D=neighbours, BX=affinity.BLOCK, num_warps=affinity.WARPS)
            product_sums[grid](p, grad, partial, height, width, **options)
    return partial.sum(dtype=torch.float64).float(), grad


@triton.jit
def product_sums(p, grad, partial, height, width, GRADIENT: tl.constexpr, D: tl.constexpr, BX: tl.constexpr):
    """A program per plane and ``BX`` pixels. A pixel has as many neighbours as it is a neighbour of, at the
    border too, so the gradient is twice the sum of its neighbours."""
    size = height * width
    across = tl.cdiv(size, BX)
    plane = (tl.program_id(0) // across).to(tl.int64)
    i = tl.program_id(0) % across * BX + tl.arange(0, BX)  # [BX]
    ok = i < size  # [BX]
    image = p + plane * size
    # The neighbours are added before the product, because their sum is also the gradient.
    around = tl.zeros((BX,), tl.float32)  # [BX]
    for d in range(D):
        cell = 2 * d + 1 if D == 4 else d + d // 4
        row = inside(i // width + cell // 3 - 1, height)  # [BX]
        column = inside(i % width + cell % 3 - 1, width)  # [BX]
        around += tl.load(image + row * width + column, mask=ok, other=0.0).to(tl.float32)
    # A pixel past the plane is 0, so the sum needs no mask.
    own = tl.load(image + i, mask=ok, other=0.0).to(tl.float32)  # [BX]
    tl.store(partial + tl.program_id(0), tl.sum(own * around, 0))
    if GRADIENT:
        tl.store(grad + plane * size + i, 2.0 * around, mask=ok)
