"""Depthwise convolution of channels-last features.

An output pixel is a sum of a few rows of channels, each multiplied by a row of the weights, and so is the
gradient of an input pixel. One kernel computes both: a program owns pixels and channels, and reads the taps
from the cache.
The gradient of the weights keeps a row of taps in registers while it passes over the pixels. Each program
writes its own sums, which torch adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, channel_block, channel_rows, narrow, on_device

PIXELS = 128 if INTERPRETED else 32
"""Number of pixels of a tile."""

RUN = 1024
"""Number of pixels that a program of the weight gradient passes over."""


def depthwise_conv2d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
) -> Tensor:
    """[B, C, h', w'], channels-last, in the dtype of ``x``; the low-level op of the same name."""
    batch, channels, h, w = x.shape
    height, width = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip((h, w), weight.shape[2:], strict=True)
    )
    out = x.new_empty(batch, height, width, channels)
    _sum_taps(channel_rows(x), weight, bias, out, stride, padding, dilation, back=False)
    return out.permute(0, 3, 1, 2)


def depthwise_conv2d_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """``(gradient of x or [0], gradient of weight or [0])``; the low-level op of the same name."""
    grad, x = channel_rows(grad), channel_rows(x)
    by_x, by_weight = x.new_empty(0), weight.new_empty(0)
    if for_x:
        by_x = torch.empty_like(x)
        _sum_taps(grad, weight, None, by_x, stride, padding, dilation, back=True)
        by_x = by_x.permute(0, 3, 1, 2)
    if for_weight:
        by_weight = _gradient_of_weight(grad, x, weight, stride, padding, dilation)
    return by_x, by_weight


def _sum_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    back: bool,
) -> None:
    batch, height, width, channels = out.shape
    pixels, block = batch * height * width, channel_block(channels)
    if not out.numel():
        return
    with on_device(x):
        tap_sums[(triton.cdiv(pixels, PIXELS), triton.cdiv(channels, block))](
            x,
            weight.reshape(channels, -1).T.contiguous(),  # channels last, as the features
            weight if bias is None else bias.contiguous(),
            out,
            pixels,
            channels,
            height,
            width,
            *x.shape[1:3],
            stride,
            padding,
            dilation,
            BIAS=bias is not None,
            BACK=back,
            STRIDED=stride > 1,
            KH=weight.shape[2],
            KW=weight.shape[3],
            UPCAST=INTERPRETED,
            BP=PIXELS,
            BC=block,
            num_warps=4,
        )


def _gradient_of_weight(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    batch, height, width, channels = grad.shape
    kh, kw = weight.shape[2:]
    pixels, across = batch * height * width, triton.next_power_of_2(kw)
    if not x.numel():
        return torch.zeros_like(weight)
    rows = PIXELS // 2
    block = min(channel_block(channels), max(16, 4096 // (rows * across)))
    runs = triton.cdiv(pixels, RUN)
    partial = torch.empty(runs, kh * kw, channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        weight_sums[(runs, triton.cdiv(channels, block), kh)](
            grad,
            x,
            partial,
            pixels,
            channels,
            height,
            width,
            *x.shape[1:3],
            stride,
            padding,
            dilation,
            KW=kw,
            KP=across,
            RUN=RUN,
            BP=rows,
            BC=block,
            num_warps=4,
        )
    return partial.sum(0).T.reshape(weight.shape).to(weight.dtype)


@triton.jit
def tap_sums(
    x,
    weight,
    bias,
    out,
    pixels,
    channels,
    height,
    width,
    h,
    w,
    stride,
    padding,
    dilation,
    BIAS: tl.constexpr,
    BACK: tl.constexpr,
    STRIDED: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UPCAST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per ``BP`` pixels of ``out`` [B, height, width, C] and ``BC`` channels: the sums over the
    taps of ``x`` [B, h, w, C]. With ``BACK``, ``out`` is the gradient of the input, ``x`` that of the
    output."""
    # Pixels are counted in 32 bits, because these divide quickly; elements need 64 bits.
    p = tl.program_id(0) * BP + tl.arange(0, BP)  # [BP]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    p_ok = p < pixels  # [BP]
    c_ok = c < channels  # [BC]
    image = p // (height * width)  # [BP]
    row = p // width % height  # [BP]
    column = p % width  # [BP]
    total = tl.zeros((BP, BC), tl.float32)  # [BP, BC]
    if BIAS:
        total += tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    for k in range(KH):
        for j in tl.static_range(KW):
            # Forward, an output reads the input at a tap; backward, this finds the output that read there.
            if BACK:
                y = row + padding - k * dilation  # [BP]
                z = column + padding - j * dilation  # [BP]
                there = p_ok & (y >= 0) & (z >= 0)  # [BP]
                if STRIDED:
                    there = there & (y % stride == 0) & (z % stride == 0)
                    y = y // stride
                    z = z // stride
            else:
                y = row * stride - padding + k * dilation
                z = column * stride - padding + j * dilation
                there = p_ok & (y >= 0) & (z >= 0)
            there = there & (y < h) & (z < w)
            at = ((image * h + y) * w + z).to(tl.int64)[:, None] * channels + c[None, :]  # [BP, BC]
            value = tl.load(x + at, mask=there[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
            tap = tl.load(weight + (k * KW + j) * channels + c, mask=c_ok, other=0.0)  # [BC]
            total += value * tap.to(tl.float32)[None, :]
    to = out + p.to(tl.int64)[:, None] * channels + c[None, :]  # [BP, BC]
    tl.store(to, narrow(total, out, UPCAST), mask=p_ok[:, None] & c_ok[None, :])


@triton.jit
def weight_sums(
    grad,
    x,
    partial,
    pixels,
    channels,
    height,
    width,
    h,
    w,
    stride,
    padding,
    dilation,
    KW: tl.constexpr,
    KP: tl.constexpr,
    RUN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per run of output pixels, ``BC`` channels and row of taps: the part [KW, C] of the weight
    gradient."""
    start = tl.program_id(0) * RUN
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    k = tl.program_id(2)
    j = tl.arange(0, KP)  # [KP]
    total = tl.zeros((KP, BP, BC), tl.float32)  # [KP, BP, BC]
    # Each pixel has its own sums until the end, so that threads need not communicate before.
    for first in range(0, RUN, BP):
        p = start + first + tl.arange(0, BP)  # [BP]
        p_ok = p < pixels  # [BP]
        image = p // (height * width)  # [BP]
        y = p // width % height * stride - padding + k * dilation  # [BP]
        column = p % width * stride - padding  # [BP]
        z = column[None, :] + j[:, None] * dilation  # [KP, BP]
        there = (p_ok & (y >= 0) & (y < h))[None, :] & (j < KW)[:, None] & (z >= 0) & (z < w)  # [KP, BP]
        at = (((image * h + y) * w)[None, :] + z).to(tl.int64)  # [KP, BP]
        mask = there[:, :, None] & c_ok[None, None, :]  # [KP, BP, BC]
        value = tl.load(x + at[:, :, None] * channels + c[None, None, :], mask=mask, other=0.0)
        g_at = p.to(tl.int64)[:, None] * channels + c[None, :]  # [BP, BC]
        g = tl.load(grad + g_at, mask=p_ok[:, None] & c_ok[None, :], other=0.0)  # [BP, BC]
        total += value.to(tl.float32) * g.to(tl.float32)[None, :, :]
    rows = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + k) * KW + j  # [KP]
    to = partial + rows[:, None] * channels + c[None, :]  # [KP, BC]
    tl.store(to, tl.sum(total, 1), mask=(j < KW)[:, None] & c_ok[None, :])
