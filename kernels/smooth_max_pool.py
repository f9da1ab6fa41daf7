"""Log-mean-exp of every plane: one read forward, one read and one write backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, narrow, on_device

BLOCK = 2048
"""Number of pixels at a time."""

BLOCKS = 8
"""Number of blocks of a program, one after the other."""


def smooth_max_pool_fwd(logits: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """``log(mean exp(k z)) / k`` and ``log(sum exp(k z))`` [B, K] in float32; the low-level op of the same
    name."""
    logits = logits.contiguous()
    pixels = logits.shape[2] * logits.shape[3]
    chunks = triton.cdiv(pixels, BLOCK * BLOCKS)
    options = dict(dtype=torch.float32, device=logits.device)
    pooled, lse = torch.empty(2, *logits.shape[:2], **options)
    parts = torch.empty(2, pooled.numel(), chunks, **options)
    with on_device(logits):
        if parts.numel():
            pool_parts[(parts[0].numel(),)](
                logits, *parts, pixels, chunks, k, BLOCKS=BLOCKS, BN=BLOCK, num_warps=4
            )
            merge_parts[(pooled.numel(),)](
                *parts, pooled, lse, chunks, k, math.log(pixels), BN=64, num_warps=1
            )
    return pooled, lse


def smooth_max_pool_bwd(grad: Tensor, logits: Tensor, lse: Tensor, k: float) -> Tensor:
    """``grad softmax(k z)``; the low-level op of the same name."""
    logits = logits.contiguous()
    pixels = logits.shape[2] * logits.shape[3]
    out = torch.empty_like(logits)
    with on_device(logits):
        if out.numel():
            grid = (lse.numel() * triton.cdiv(pixels, BLOCK),)
            tensors = (grad.float().contiguous(), logits, lse.contiguous(), out)
            pool_planes_gradient[grid](*tensors, pixels, k, UPCAST=INTERPRETED, BN=BLOCK, num_warps=4)
    return out


@triton.jit
def pool_parts(logits, tops, totals, pixels, parts, k, BLOCKS: tl.constexpr, BN: tl.constexpr):
    """A program per plane and ``BLOCKS BN`` of its pixels, because planes are few and large: the largest
    ``k z``, and the sum of ``exp(k z - top)``. Every lane has its own."""
    plane = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * BLOCKS * BN
    i = tl.arange(0, BN)  # [BN]
    # The first top is finite, because a difference of two infinities would be NaN.
    top = tl.full((BN,), -3.0e38, tl.float32)  # [BN]
    total = tl.zeros((BN,), tl.float32)  # [BN]
    # A sum is rescaled to the new top before more is added, so that no exponential exceeds 1.
    for start in range(first, tl.minimum(first + BLOCKS * BN, pixels), BN):
        ok = i < pixels - start  # [BN]
        z = tl.load(logits + plane * pixels + start + i, mask=ok, other=0.0).to(tl.float32) * k  # [BN]
        # Lanes past the plane keep their top and add nothing.
        higher = tl.where(ok, tl.maximum(top, z), top)  # [BN]
        total = total * tl.exp(top - higher) + tl.where(ok, tl.exp(z - higher), 0.0)
        top = higher
    # Lanes are reduced once, after the last block: a reduction per block would make all warps wait.
    best = tl.max(top, 0)
    tl.store(tops + tl.program_id(0), best)
    tl.store(totals + tl.program_id(0), tl.sum(total * tl.exp(top - best), 0))


@triton.jit
def merge_parts(tops, totals, pooled, lse, parts, k, log_pixels, BN: tl.constexpr):
    """A program per plane."""
    plane = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BN)  # [BN]
    top = tl.full((BN,), -3.0e38, tl.float32)  # [BN]
    total = tl.zeros((BN,), tl.float32)  # [BN]
    # Parts are merged like blocks, in a fixed order, so that two runs agree bit for bit.
    for start in range(0, parts, BN):
        ok = i < parts - start  # [BN]
        here = tl.load(tops + plane * parts + start + i, mask=ok, other=-3.0e38)  # [BN]
        higher = tl.maximum(top, here)  # [BN]
        total *= tl.exp(top - higher)
        total += tl.load(totals + plane * parts + start + i, mask=ok, other=0.0) * tl.exp(here - higher)
        top = higher
    # Lanes are reduced once; the logarithm of the number of pixels turns the sum into a mean.
    best = tl.max(top, 0)
    whole = tl.sum(total * tl.exp(top - best), 0)
    value = best + tl.log(whole)
    tl.store(lse + plane, value)
    tl.store(pooled + plane, (value - log_pixels) / k)


@triton.jit
def pool_planes_gradient(grad, logits, lse, out, pixels, k, UPCAST: tl.constexpr, BN: tl.constexpr):
    """A program per plane and block of pixels. It uses the log-sum-exp, because ``pooled k`` would put the
    rounding of a division into an exponent."""
    blocks = tl.cdiv(pixels, BN)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    ok = i < pixels  # [BN]
    z = tl.load(logits + plane * pixels + i, mask=ok, other=0.0).to(tl.float32) * k  # [BN]
    # Shares are float32 and rounded once, when they are stored.
    share = tl.exp(z - tl.load(lse + plane))  # [BN]
    tl.store(out + plane * pixels + i, narrow(tl.load(grad + plane) * share, out, UPCAST), mask=ok)
