"""Contrast-normalised softmax of rows: one read and one write while a row fits in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, LOG2E, narrow, on_device

WHOLE = 1024 if INTERPRETED else 16384
"""The longest row that one program holds; longer rows are read in blocks of half this length."""


def contrast_softmax_fwd(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(y, 1 / (std + eps))``; the low-level op of the same name."""
    x = x.contiguous()
    y = torch.empty_like(x)
    inv_std = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    with on_device(x):
        if x.numel():
            _launch(softmax_rows, x, (x, y, inv_std), eps)
    return y, inv_std


def contrast_softmax_bwd(grad: Tensor, y: Tensor, inv_std: Tensor) -> Tensor:
    """``inv_std y (grad - sum(grad y))``, mean and std detached; the low-level op of the same name."""
    grad, y = grad.contiguous(), y.contiguous()
    out = torch.empty_like(y)
    with on_device(y):
        if y.numel():
            _launch(softmax_rows_gradient, y, (grad, y, inv_std.contiguous(), out), None)
    return out


def _launch(kernel, x: Tensor, tensors: tuple[Tensor, ...], eps: float | None) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width) if width <= WHOLE else WHOLE // 2
    # Short rows share a program; a program with a long row has 32 elements per thread.
    height = max(1, (8192 if INTERPRETED else 2048) // block)
    constants = {} if eps is None else {"EPS": eps, "LOG2E": LOG2E}
    kernel[(triton.cdiv(rows, height),)](
        *tensors,
        rows,
        width,
        **constants,
        WHOLE=width <= block,
        UPCAST=INTERPRETED,
        BR=height,
        BC=block,
        num_warps=min(16, max(4, block * height // 1024)),
    )


@triton.jit
def softmax_rows(
    x,
    y,
    inv_std,
    rows,
    width,
    EPS: tl.constexpr,
    LOG2E: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``BR`` rows per program. Long rows are read three times: for the moments (by Chan's formula), for the
    sum, and for the result. The second and third read hit L2."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    row_ok = row < rows  # [BR]
    c = tl.arange(0, BC)  # [BC]
    at = row[:, None] * width + c[None, :]  # [BR, BC]
    mask = row_ok[:, None] & (c < width)[None, :]  # [BR, BC]
    # The first block stays in registers to the end, so a row that fits in it is read once.
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    count = tl.minimum(width, BC).to(tl.float32)
    # The squares are of deviations from the mean, so that a large common value costs no precision.
    mean = tl.sum(value, 1) / count  # [BR]
    d = tl.where(mask, value - mean[:, None], 0.0)  # [BR, BC]
    m2 = tl.sum(d * d, 1)  # [BR]
    top = tl.max(tl.where(mask, value, float("-inf")), 1)  # [BR]
    if not WHOLE:
        # Later blocks are merged with their own means and are as exact as the first.
        for start in range(BC, width, BC):
            ok = row_ok[:, None] & (c < width - start)[None, :]  # [BR, BC]
            v = tl.load(x + at + start, mask=ok, other=0.0).to(tl.float32)  # [BR, BC]
            here = tl.minimum(width - start, BC).to(tl.float32)
            v_mean = tl.sum(v, 1) / here  # [BR]
            d = tl.where(ok, v - v_mean[:, None], 0.0)
            delta = v_mean - mean  # [BR]
            both = count + here
            m2 += tl.sum(d * d, 1) + delta * delta * (count * here / both)
            mean += delta * (here / both)
            count = both
            top = tl.maximum(top, tl.max(tl.where(ok, v, float("-inf")), 1))
    # A row of one element has deviation 0, not 0 / 0.
    inv = 1.0 / (tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0)) + EPS)  # [BR]
    tl.store(inv_std + row, inv, mask=row_ok)
    # The scale includes the base of the exponential, because the hardware has exp2.
    scale = inv * LOG2E  # [BR]
    # Rows past the last have no top; 0 keeps their exponentials finite.
    top = tl.where(row_ok, top, 0.0)
    e = tl.where(mask, tl.exp2((value - top[:, None]) * scale[:, None]), 0.0)  # [BR, BC]
    total = tl.sum(e, 1)  # [BR]
    if WHOLE:
        tl.store(y + at, narrow(e / total[:, None], y, UPCAST), mask=mask)
    else:
        # The sum needs the scale, and the result needs the sum: two more passes over a long row.
        for start in range(BC, width, BC):
            ok = row_ok[:, None] & (c < width - start)[None, :]
            v = tl.load(x + at + start, mask=ok, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(ok, tl.exp2((v - top[:, None]) * scale[:, None]), 0.0), 1)
        for start in range(0, width, BC):
            ok = row_ok[:, None] & (c < width - start)[None, :]
            v = tl.load(x + at + start, mask=ok, other=0.0).to(tl.float32)
            e = tl.exp2((v - top[:, None]) * scale[:, None]) / total[:, None]
            tl.store(y + at + start, narrow(e, y, UPCAST), mask=ok)


@triton.jit
def softmax_rows_gradient(
    grad,
    y,
    inv_std,
    out,
    rows,
    width,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``BR`` rows per program."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    row_ok = row < rows  # [BR]
    c = tl.arange(0, BC)  # [BC]
    at = row[:, None] * width + c[None, :]  # [BR, BC]
    mask = row_ok[:, None] & (c < width)[None, :]  # [BR, BC]
    # Both are float32 from here on, because the inner product adds a whole row.
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    p = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    inv = tl.load(inv_std + row, mask=row_ok, other=0.0)  # [BR]
    along = tl.sum(g * p, 1)  # [BR]
    if WHOLE:
        tl.store(out + at, narrow(inv[:, None] * p * (g - along[:, None]), out, UPCAST), mask=mask)
    else:
        # The result needs the inner product of the whole row, so a long row is read twice.
        for start in range(BC, width, BC):
            ok = row_ok[:, None] & (c < width - start)[None, :]  # [BR, BC]
            g = tl.load(grad + at + start, mask=ok, other=0.0).to(tl.float32)
            along += tl.sum(g * tl.load(y + at + start, mask=ok, other=0.0).to(tl.float32), 1)
        for start in range(0, width, BC):
            ok = row_ok[:, None] & (c < width - start)[None, :]
            g = tl.load(grad + at + start, mask=ok, other=0.0).to(tl.float32)
            p = tl.load(y + at + start, mask=ok, other=0.0).to(tl.float32)
            value = inv[:, None] * p * (g - along[:, None])  # [BR, BC]
            tl.store(out + at + start, narrow(value, out, UPCAST), mask=ok)
