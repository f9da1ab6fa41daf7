"""Log-mean-exp of every plane: one read forward, one read and one write backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, narrow, on_device

BLOCK = 2048
"""Pixels at a time."""


def smooth_max_pool_fwd(logits: Tensor, k: float) -> Tensor:
    """``log(mean exp(k z)) / k`` [B, K] in float32; the low-level op of the same name."""
    logits = logits.contiguous()
    pixels = logits.shape[2] * logits.shape[3]
    pooled = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    with on_device(logits):
        if pooled.numel():
            pool_planes[(pooled.numel(),)](logits, pooled, pixels, k, math.log(pixels), BN=BLOCK, num_warps=4)
    return pooled


def smooth_max_pool_bwd(grad: Tensor, logits: Tensor, pooled: Tensor, k: float) -> Tensor:
    """``grad softmax(k z)``; the low-level op of the same name."""
    logits = logits.contiguous()
    pixels = logits.shape[2] * logits.shape[3]
    out = torch.empty_like(logits)
    with on_device(logits):
        if out.numel():
            grid = (pooled.numel(), triton.cdiv(pixels, BLOCK))
            rest = (pixels, k, math.log(pixels))
            tensors = (grad.float().contiguous(), logits, pooled, out)
            pool_planes_gradient[grid](*tensors, *rest, UPCAST=INTERPRETED, BN=BLOCK, num_warps=4)
    return out


@triton.jit
def pool_planes(logits, pooled, pixels, k, log_pixels, BN: tl.constexpr):
    """A program per plane; every lane keeps its own maximum and sum."""
    plane = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)
    top = tl.full((BN,), -3.0e38, tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, pixels, BN):
        ok = i < pixels - start
        z = tl.load(logits + plane * pixels + start + i, mask=ok, other=0.0).to(tl.float32) * k
        higher = tl.where(ok, tl.maximum(top, z), top)
        total = total * tl.exp(top - higher) + tl.where(ok, tl.exp(z - higher), 0.0)
        top = higher
    best = tl.max(top, 0)
    whole = tl.sum(total * tl.exp(top - best), 0)
    tl.store(pooled + plane, (best + tl.log(whole) - log_pixels) / k)


@triton.jit
def pool_planes_gradient(
    grad, logits, pooled, out, pixels, k, log_pixels, UPCAST: tl.constexpr, BN: tl.constexpr
):
    """A program per plane and block of pixels."""
    plane = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    ok = i < pixels
    z = tl.load(logits + plane * pixels + i, mask=ok, other=0.0).to(tl.float32) * k
    share = tl.exp(z - (tl.load(pooled + plane) * k + log_pixels))
    tl.store(out + plane * pixels + i, narrow(tl.load(grad + plane) * share, out, UPCAST), mask=ok)
