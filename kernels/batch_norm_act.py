"""Batch norm followed by an activation, for channels-last features.

The kernels here read and write every pixel once; the gradient recomputes the activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, channel_block, channel_rows, narrow, on_device
from fastuda.kernels._norm_sums import norm_of, passed, run_moments, run_sums, whole_moments, whole_sums

TILE = 8192 if INTERPRETED else 1024
"""Number of elements of a tile; 16 bytes per thread in half precision."""

MOMENT_TILES, SUM_TILES, PIXEL_TILES = 4, 2, 4
"""Number of tiles, one below the other, that a program holds at once: for the statistics, for the sums of the
gradient, and for the kernels that work on every pixel."""

PROGRAMS = 768
"""Largest number of programs that pass over runs: six per multiprocessor, which run at once and leave few
runs to merge."""

RUNS = 256
"""Number of runs that are merged at a time."""


def batch_norm_act_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over images and pixels in float32; the low-level op of the same name."""
    rows = _Rows.of(x)
    mean = torch.empty(rows.channels, dtype=torch.float32, device=x.device)
    variance = torch.empty_like(mean)
    if not x.numel():
        return mean.fill_(torch.nan), variance.fill_(torch.nan)
    runs, run = rows.runs(MOMENT_TILES)
    parts = torch.empty(2, runs, rows.channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        run_moments[(runs, rows.across)](rows.x, *parts, *rows.sizes, run, DEEP=MOMENT_TILES, **rows.tile())
        whole_moments[(triton.cdiv(rows.channels, 16),)](
            *parts, mean, variance, rows.pixels, rows.channels, runs, run, BR=RUNS, BC=16, num_warps=8
        )
    return mean, variance


def batch_norm_act_fwd(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """[B, C, h, w], channels-last, in the dtype of ``x``; the low-level op of the same name."""
    rows, norm = _Rows.of(x), _norm(mean, variance, weight, bias)
    # not a view, because the output of a layer may be changed in place
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel():
        with on_device(x):
            clamp_rows[rows.grid(PIXEL_TILES)](
                rows.x, *norm, out, *rows.sizes, eps, low, high, UPCAST=INTERPRETED, **rows.tile(PIXEL_TILES)
            )
    return out


def batch_norm_act_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: float,
    high: float,
    training: bool,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(gradient of x or [0], of weight, of bias)``; the low-level op of the same name."""
    rows, norm, g = _Rows.of(x), _norm(mean, variance, weight, bias), channel_rows(grad)
    by_x = torch.empty_like(rows.x) if for_x else x.new_empty(0)
    by_weight, by_bias = torch.empty_like(norm[2]), torch.empty_like(norm[3])
    if x.numel():
        runs, run = rows.runs(SUM_TILES)
        parts = torch.empty(2, runs, rows.channels, dtype=torch.float32, device=x.device)
        with on_device(x):
            run_sums[(runs, rows.across)](
                g, rows.x, *norm, *parts, *rows.sizes, run, eps, low, high, **rows.tile(SUM_TILES)
            )
            whole_sums[(triton.cdiv(rows.channels, 16),)](
                *parts, norm[1], by_weight, by_bias, rows.channels, runs, eps, BR=RUNS, BC=16, num_warps=8
            )
            if for_x:
                gradient_rows[rows.grid(PIXEL_TILES)](
                    g,
                    rows.x,
                    *norm,
                    by_weight,
                    by_bias,
                    by_x,
                    *rows.sizes,
                    eps,
                    low,
                    high,
                    TRAINING=training,
                    UPCAST=INTERPRETED,
                    **rows.tile(PIXEL_TILES),
                )
    else:
        by_weight.zero_()
        by_bias.zero_()
    return by_x.permute(0, 3, 1, 2) if for_x else by_x, by_weight, by_bias


class _Rows(NamedTuple):
    """Features as rows of channels, one row per pixel, and their tiles."""

    x: Tensor
    """[B, h, w, C], contiguous."""
    pixels: int
    channels: int
    block: int
    """Number of channels of a tile."""

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        channels = x.shape[1]
        return cls(channel_rows(x), x.numel() // channels, channels, channel_block(channels))

    @property
    def unit(self) -> int:
        """A power of two; rows begin at its multiples. It decides how much a thread reads at once."""
        return min(16, self.channels & -self.channels)

    @property
    def sizes(self) -> tuple[int, int]:
        """Pixels, and channels in units."""
        return self.pixels, self.channels // self.unit

    @property
    def across(self) -> int:
        """Number of tiles from the first channel to the last."""
        return triton.cdiv(self.channels, self.block)

    def tile(self, high: int = 1) -> dict[str, int]:
        return dict(UNIT=self.unit, BP=high * TILE // self.block, BC=self.block, num_warps=4)

    def grid(self, high: int) -> tuple[int, int]:
        return triton.cdiv(self.pixels, high * TILE // self.block), self.across

    def runs(self, high: int) -> tuple[int, int]:
        """Number of runs, and the pixels of each but the last. They depend only on the sizes, so that two
        executions add in the same order."""
        step = high * TILE // self.block
        tiles = triton.cdiv(self.pixels, step)
        run = step * triton.cdiv(tiles, max(1, PROGRAMS // self.across))
        return triton.cdiv(self.pixels, run), run


def _norm(*channels: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in channels)


@triton.jit
def clamp_rows(
    x,
    mean,
    variance,
    weight,
    bias,
    out,
    pixels,
    units,
    eps,
    low,
    high,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per ``BP`` pixels and ``BC`` channels: ``clamp(scale x + shift, low, high)``."""
    channels = units * UNIT
    p = tl.program_id(0) * BP + tl.arange(0, BP)  # [BP]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    at = p.to(tl.int64)[:, None] * channels + c[None, :]  # [BP, BC]
    mask = (p < pixels)[:, None] & c_ok[None, :]  # [BP, BC]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
    scale, shift, _, _ = norm_of(mean, variance, weight, bias, c, c_ok, eps)  # [BC] each
    z = tl.fma(value, scale[None, :], shift[None, :])  # [BP, BC]
    # A minimum and a maximum would clamp NaN.
    z = tl.where(z < low, low, z)
    z = tl.where(z > high, high, z)
    tl.store(out + at, narrow(z, out, UPCAST), mask=mask)


@triton.jit
def gradient_rows(
    grad,
    x,
    mean,
    variance,
    weight,
    bias,
    by_weight,
    by_bias,
    out,
    pixels,
    units,
    eps,
    low,
    high,
    TRAINING: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per ``BP`` pixels and ``BC`` channels: ``scale g``, and in training minus the part through
    the statistics, ``scale (by_bias + rstd by_weight (x - mean)) / pixels``."""
    channels = units * UNIT
    p = tl.program_id(0) * BP + tl.arange(0, BP)  # [BP]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    at = p.to(tl.int64)[:, None] * channels + c[None, :]  # [BP, BC]
    mask = (p < pixels)[:, None] & c_ok[None, :]  # [BP, BC]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
    scale, shift, m, rstd = norm_of(mean, variance, weight, bias, c, c_ok, eps)  # [BC] each
    result = scale[None, :] * passed(g, value, scale, shift, low, high)  # [BP, BC]
    if TRAINING:
        share = -scale * (1.0 / pixels)  # [BC]
        slope = share * rstd * tl.load(by_weight + c, mask=c_ok, other=0.0)  # [BC]
        constant = share * tl.load(by_bias + c, mask=c_ok, other=0.0)  # [BC]
        result += slope[None, :] * (value - m[None, :]) + constant[None, :]
    tl.store(out + at, narrow(result, out, UPCAST), mask=mask)
