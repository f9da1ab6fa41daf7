"""Sums over the pixels for :mod:`fastuda.kernels.batch_norm_act`: the statistics, and the gradients of weight
and bias.

A program passes over a run of pixels. Every element of its tile has its own sum; at the end the program
writes one result per channel. A second kernel merges the runs in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def run_moments(
    x,
    means,
    squares,
    pixels,
    units,
    run,
    DEEP: tl.constexpr,
    UNIT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per run of pixels and ``BC`` channels: their mean and the sum of squared differences from it,
    [runs, C] each."""
    channels = units * UNIT
    start = tl.program_id(0) * run
    length = tl.minimum(pixels - start, run)
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    place = tl.arange(0, BP)  # [BP]
    i = tl.arange(0, DEEP)[:, None] * BP + place[None, :]  # [DEEP, BP]
    count = tl.zeros((BP,), tl.float32)  # [BP]
    mean = tl.zeros((BP, BC), tl.float32)  # [BP, BC]
    square = tl.zeros((BP, BC), tl.float32)  # [BP, BC]
    # Each element of the tile has its own moments until the end, so no thread waits for another before.
    for first in range(0, length, DEEP * BP):
        ok = i < length - first  # [DEEP, BP]
        at = (start + first + i).to(tl.int64)[:, :, None] * channels + c[None, None, :]  # [DEEP, BP, BC]
        mask = ok[:, :, None] & c_ok[None, None, :]  # [DEEP, BP, BC]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [DEEP, BP, BC]
        # the number of values of an element; a sum over ``ok`` would make threads wait
        here = tl.minimum((length - first - place + BP - 1) // BP, DEEP).to(tl.float32)  # [BP]
        # Differences are from the mean of these few values, so that a large common mean costs no precision.
        local = tl.sum(value, 0) * (1.0 / tl.maximum(here, 1.0))[:, None]  # [BP, BC]
        d = tl.where(ok[:, :, None], value - local[None, :, :], 0.0)  # [DEEP, BP, BC]
        # merges the moments of two sets of values (Chan et al., 1979)
        both = count + here  # [BP]
        part = here / tl.maximum(both, 1.0)  # [BP]
        gap = local - mean  # [BP, BC]
        square += tl.sum(d * d, 0) + gap * gap * (count * part)[:, None]
        mean += gap * part[:, None]
        count = both
    # Means are added as differences from one of them, to keep the precision of small differences.
    near = tl.sum(tl.where((place == 0)[:, None], mean, 0.0), 0)  # [BC]
    mean = tl.where((count > 0.0)[:, None], mean - near[None, :], 0.0)
    whole = tl.sum(mean * count[:, None], 0) / length.to(tl.float32)  # [BC]
    gap = mean - whole[None, :]
    to = tl.program_id(0).to(tl.int64) * channels + c  # [BC]
    tl.store(means + to, near + whole, mask=c_ok)
    tl.store(squares + to, tl.sum(square + gap * gap * count[:, None], 0), mask=c_ok)


@triton.jit(do_not_specialize=["runs"])
def whole_moments(
    means, squares, mean, variance, pixels, channels, runs, run, BR: tl.constexpr, BC: tl.constexpr
):
    """A program per ``BC`` channels: the moments of all runs from those of each."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    r = tl.arange(0, BR)  # [BR]
    # The mean is complete before differences from it are taken; it is summed as differences from the first.
    near = tl.load(means + c, mask=c_ok, other=0.0)  # [BC]
    total = tl.zeros((BR, BC), tl.float32)  # [BR, BC]
    for first in range(0, runs, BR):
        mask = (first + r < runs)[:, None] & c_ok[None, :]  # [BR, BC]
        at = (first + r).to(tl.int64)[:, None] * channels + c[None, :]  # [BR, BC]
        count = tl.minimum(pixels - (first + r) * run, run).to(tl.float32)  # [BR]
        gap = tl.load(means + at, mask=mask, other=0.0) - near[None, :]  # [BR, BC]
        total += tl.where(mask, gap * count[:, None], 0.0)
    whole = near + tl.sum(total, 0) / pixels  # [BC]
    total = tl.zeros((BR, BC), tl.float32)
    for first in range(0, runs, BR):
        mask = (first + r < runs)[:, None] & c_ok[None, :]
        at = (first + r).to(tl.int64)[:, None] * channels + c[None, :]
        count = tl.minimum(pixels - (first + r) * run, run).to(tl.float32)
        gap = tl.load(means + at, mask=mask, other=0.0) - whole[None, :]  # [BR, BC]
        inner = tl.load(squares + at, mask=mask, other=0.0)  # [BR, BC]
        total += tl.where(mask, inner + gap * gap * count[:, None], 0.0)
    tl.store(mean + c, whole, mask=c_ok)
    tl.store(variance + c, tl.sum(total, 0) / pixels, mask=c_ok)


@triton.jit
def norm_of(mean, variance, weight, bias, c, c_ok, eps):
    """``scale`` and ``shift`` of the norm ``z = scale x + shift`` for channels, and their mean and inverse
    deviation."""
    m = tl.load(mean + c, mask=c_ok, other=0.0)  # [BC]
    rstd = tl.rsqrt(tl.load(variance + c, mask=c_ok, other=1.0) + eps)  # [BC]
    scale = tl.load(weight + c, mask=c_ok, other=0.0) * rstd  # [BC]
    # an explicit fma, so that all kernels round alike
    shift = tl.fma(-m, scale, tl.load(bias + c, mask=c_ok, other=0.0))  # [BC]
    return scale, shift, m, rstd


@triton.jit
def passed(g, x, scale, shift, low, high):
    """The gradient of ``z = scale x + shift``; 0 where ``z`` is clamped."""
    z = tl.fma(x, scale[None, :], shift[None, :])  # [BP, BC], as in clamp_rows
    return tl.where((z <= low) | (z >= high), 0.0, g)


@triton.jit
def run_sums(
    grad,
    x,
    mean,
    variance,
    weight,
    bias,
    sums,
    alongs,
    pixels,
    units,
    run,
    eps,
    low,
    high,
    UNIT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per run of pixels and ``BC`` channels: the sums of ``g`` and ``g (x - mean)``, [runs, C]
    each, where ``g`` is the gradient, or 0 where the output is clamped."""
    channels = units * UNIT
    start = tl.program_id(0) * run
    length = tl.minimum(pixels - start, run)
    i = tl.arange(0, BP)  # [BP]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    scale, shift, m, _ = norm_of(mean, variance, weight, bias, c, c_ok, eps)  # [BC] each
    total = tl.zeros((BP, BC), tl.float32)  # [BP, BC]
    along = tl.zeros((BP, BC), tl.float32)  # [BP, BC]
    # Each element of the tile has its own sums until the end, so no thread waits for another before.
    for first in range(0, length, BP):
        mask = (i < length - first)[:, None] & c_ok[None, :]  # [BP, BC]
        at = (start + first + i).to(tl.int64)[:, None] * channels + c[None, :]  # [BP, BC]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
        g = passed(g, value, scale, shift, low, high)
        total += g
        along += g * (value - m[None, :])
    to = tl.program_id(0).to(tl.int64) * channels + c  # [BC]
    tl.store(sums + to, tl.sum(total, 0), mask=c_ok)
    tl.store(alongs + to, tl.sum(along, 0), mask=c_ok)


@triton.jit(do_not_specialize=["runs"])
def whole_sums(
    sums,
    alongs,
    variance,
    by_weight,
    by_bias,
    channels,
    runs,
    eps,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program per ``BC`` channels: the gradients of weight and bias, from the sums of all runs."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)  # [BC]
    c_ok = c < channels  # [BC]
    r = tl.arange(0, BR)  # [BR]
    total = tl.zeros((BR, BC), tl.float32)  # [BR, BC]
    along = tl.zeros((BR, BC), tl.float32)  # [BR, BC]
    for first in range(0, runs, BR):
        mask = (first + r < runs)[:, None] & c_ok[None, :]  # [BR, BC]
        at = (first + r).to(tl.int64)[:, None] * channels + c[None, :]  # [BR, BC]
        total += tl.load(sums + at, mask=mask, other=0.0)
        along += tl.load(alongs + at, mask=mask, other=0.0)
    rstd = tl.rsqrt(tl.load(variance + c, mask=c_ok, other=1.0) + eps)  # [BC]
    tl.store(by_weight + c, tl.sum(along, 0) * rstd, mask=c_ok)
    tl.store(by_bias + c, tl.sum(total, 0), mask=c_ok)
