"""Affinities of neighbouring pixels. The forward reads the probabilities and writes the maps; the backward
recomputes the terms.

A program owns a run of pixels of one plane and reads neighbours from the cache. The backward gathers: a pixel
adds its gradient as a pixel and as a neighbour of others. There are no atomics, and two runs agree bit for
bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, narrow, on_device

BLOCK = 512
"""Number of pixels of a program."""

WARPS = 8


def local_affinity_fwd(p: Tensor, neighbours: int, distance: int, product: bool) -> Tensor:
    """The maps [B, D K, H, W], or [B, D, H, W] inner products, in float32; the low-level op of the same
    name."""
    p = p.contiguous()
    batch, classes, height, width = p.shape
    planes = neighbours if product else neighbours * classes
    out = torch.empty((batch, planes, height, width), dtype=torch.float32, device=p.device)
    kernel = affinity_products if product else affinity_maps
    grid = (batch * (1 if product else classes) * triton.cdiv(height * width, BLOCK),)
    with on_device(p):
        if p.numel():
            sizes = (classes, height, width, distance)
            kernel[grid](p, out, *sizes, D=neighbours, BX=BLOCK, num_warps=WARPS)
    return out


def local_affinity_bwd(grad: Tensor, p: Tensor, neighbours: int, distance: int, product: bool) -> Tensor:
    """The gradient of the probabilities; the low-level op of the same name."""
    p, grad = p.contiguous(), grad.contiguous()
    batch, classes, height, width = p.shape
    out = torch.empty_like(p)
    with on_device(p):
        if p.numel():
            affinity_gradient[(batch * classes * triton.cdiv(height * width, BLOCK),)](
                grad,
                p,
                out,
                classes,
                height,
                width,
                distance,
                PRODUCT=product,
                NEAR=distance == 1,
                UPCAST=INTERPRETED,
                D=neighbours,
                BX=BLOCK,
                num_warps=WARPS,
            )
    return out


@triton.jit
def clamped(x):
    """``x`` clamped to [1e-4, 1]; a NaN stays NaN."""
    x = tl.where(x < 1e-4, 1e-4, x)
    return tl.where(x > 1.0, 1.0, x)


@triton.jit
def passed(x, slope):
    """The ``slope`` where ``x`` is not clamped, 0 elsewhere."""
    return tl.where((x < 1e-4) | (x > 1.0), 0.0, slope)


@triton.jit
def inside(i, size):
    """``i``, or the border if ``i`` is past it."""
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def slope_by_joint(joint, one, zero):
    """Derivative of KL(Bern(joint) || Bern(p)) with respect to the joint; ``one`` and ``zero`` are the
    clamped p and 1 - p."""
    rest = 1.0 - joint  # as `joint`
    by_one = passed(joint, tl.log(clamped(joint) / one) + 1.0)  # as `joint`
    return by_one - passed(rest, tl.log(clamped(rest) / zero) + 1.0)


@triton.jit
def affinity_maps(p, out, classes, height, width, distance, D: tl.constexpr, BX: tl.constexpr):
    """A program per plane and ``BX`` pixels: the maps of all ``D`` directions."""
    size = height * width
    across = tl.cdiv(size, BX)
    plane = (tl.program_id(0) // across).to(tl.int64)
    i = tl.program_id(0) % across * BX + tl.arange(0, BX)  # [BX]
    ok = i < size  # [BX]
    y = i // width  # [BX]
    x = i % width  # [BX]
    image = p + plane * size
    # The pixel's terms are used for all directions, in float32, because they enter logarithms.
    own = tl.load(image + i, mask=ok, other=0.0).to(tl.float32)  # [BX]
    one = clamped(own)  # [BX]
    zero = clamped(1.0 - own)  # [BX]
    to = out + (plane // classes * D * classes + plane % classes) * size
    for d in range(D):
        # A direction is a cell of the 3 x 3 around the pixel: all but the middle, or with D = 4 the odd ones.
        cell = 2 * d + 1 if D == 4 else d + d // 4
        # A neighbour past the border is the border pixel, so that every load is inside the plane.
        row = inside(y + (cell // 3 - 1) * distance, height)  # [BX]
        column = inside(x + (cell % 3 - 1) * distance, width)  # [BX]
        joint = own * tl.load(image + row * width + column, mask=ok, other=0.0).to(tl.float32)  # [BX]
        # Logarithms and quotients use clamped numbers, so that none is infinite.
        both = clamped(joint)  # [BX]
        rest = clamped(1.0 - joint)  # [BX]
        affinity = both * tl.log(both / one) + rest * tl.log(rest / zero)  # [BX]
        tl.store(to + d * tl.cast(classes, tl.int64) * size + i, affinity, mask=ok)


@triton.jit
def affinity_products(p, out, classes, height, width, distance, D: tl.constexpr, BX: tl.constexpr):
    """A program per image and ``BX`` pixels; all directions are one tile."""
    size = height * width
    across = tl.cdiv(size, BX)
    b = (tl.program_id(0) // across).to(tl.int64)
    i = tl.program_id(0) % across * BX + tl.arange(0, BX)  # [BX]
    ok = i < size  # [BX]
    d = tl.arange(0, D)  # [D]
    cell = 2 * d + 1 if D == 4 else d + d // 4  # [D]
    # The positions of the neighbours are the same in every plane and are computed once.
    row = inside((i // width)[None, :] + ((cell // 3 - 1) * distance)[:, None], height)  # [D, BX]
    column = inside((i % width)[None, :] + ((cell % 3 - 1) * distance)[:, None], width)  # [D, BX]
    total = tl.zeros((D, BX), tl.float32)  # [D, BX]
    image = p + b * classes * size
    # Planes are added in float32; the product of a single class is not written.
    for _ in range(classes):
        own = tl.load(image + i, mask=ok, other=0.0).to(tl.float32)  # [BX]
        other = tl.load(image + row * width + column, mask=ok[None, :], other=0.0).to(tl.float32)  # [D, BX]
        total += own[None, :] * other
        image += size
    tl.store(out + (b * D + d)[:, None] * size + i[None, :], total, mask=ok[None, :])


@triton.jit
def sender(i, offset, size, step):
    """Along one axis, a pixel that has ``i`` as its neighbour. It is ``i - offset``. If that is past the
    border, it is the ``step``-th pixel from the border, whose neighbour at minus ``offset`` is the border
    ``i``. Returns the pixel, whether the second case holds, and whether there is such a pixel."""
    at = i - offset  # [BX], as all return values
    past = (at < 0) | (at >= size)  # [BX]
    # Only the border itself has the second case, and an inner pixel has its sender only at the first step.
    lent = tl.where(offset > 0, i == 0, i == size - 1)  # [BX]
    border = tl.where(offset > 0, step, size - 1 - step)
    return tl.where(past, border, at), past, tl.where(past, lent, step == 0)


@triton.jit
def affinity_gradient(
    grad,
    p,
    out,
    classes,
    height,
    width,
    distance,
    PRODUCT: tl.constexpr,
    NEAR: tl.constexpr,
    UPCAST: tl.constexpr,
    D: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per plane and ``BX`` pixels: their gradient as pixels and as neighbours. ``NEAR``: the
    distance is 1, and only the border pixel itself has the border repeated as its neighbour."""
    size = height * width
    across = tl.cdiv(size, BX)
    plane = (tl.program_id(0) // across).to(tl.int64)
    start = tl.program_id(0) % across * BX
    i = start + tl.arange(0, BX)  # [BX]
    ok = i < size  # [BX]
    y = i // width  # [BX]
    x = i % width  # [BX]
    image = p + plane * size
    own = tl.load(image + i, mask=ok, other=0.0).to(tl.float32)  # [BX]
    one = clamped(own)  # [BX]
    zero = clamped(1.0 - own)  # [BX]
    b = plane // classes
    total = tl.zeros((BX,), tl.float32)  # [BX]
    for d in range(D):
        cell = 2 * d + 1 if D == 4 else d + d // 4
        oy = (cell // 3 - 1) * distance
        ox = (cell % 3 - 1) * distance
        # First the gradient as a pixel, from its map of this direction.
        # [BX]
        other = tl.load(
            image + inside(y + oy, height) * width + inside(x + ox, width), mask=ok, other=0.0
        ).to(tl.float32)
        if PRODUCT:
            total += tl.load(grad + (b * D + d) * size + i, mask=ok, other=0.0).to(tl.float32) * other
        else:
            joint = own * other  # [BX]
            # [BX]
            by_own = passed(1.0 - own, clamped(1.0 - joint) / zero) - passed(own, clamped(joint) / one)
            slope = by_own + other * slope_by_joint(joint, one, zero)  # [BX]
            # [BX]
            weight = tl.load(grad + ((b * D + d) * classes + plane % classes) * size + i, mask=ok, other=0.0)
            total += weight.to(tl.float32) * slope
        # Only a border pixel has several senders; blocks away from the upper and lower border need one row.
        if NEAR:
            rows = 1
            columns = 1
        else:
            touches = (oy != 0) & ((start < width) | (start + BX > size - width))
            rows = tl.where(touches, tl.minimum(distance, height), 1)
            columns = tl.where(ox != 0, tl.minimum(distance, width), 1)
        for step in range(rows * columns):
            # Then the gradient as a neighbour, gathered from every sender, without atomics.
            row, flip_y, row_ok = sender(y, oy, height, step // columns)  # [BX] each
            column, flip_x, column_ok = sender(x, ox, width, step % columns)  # [BX] each
            mask = ok & row_ok & column_ok  # [BX]
            # A sender has this direction, mirrored on an axis where its neighbour is past the border.
            # [BX]
            back = tl.where(flip_y, 2 - cell // 3, cell // 3) * 3 + tl.where(flip_x, 2 - cell % 3, cell % 3)
            direction = back // 2 if D == 4 else tl.where(back > 4, back - 1, back)  # [BX]
            at = row * width + column  # [BX]
            if PRODUCT:
                weights = grad + (b * D + direction) * size  # [BX]
            else:
                weights = grad + ((b * D + direction) * classes + plane % classes) * size  # [BX]
            given = tl.load(image + at, mask=mask, other=0.0).to(tl.float32)  # [BX]
            share = given * tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)  # [BX]
            if not PRODUCT:
                share *= slope_by_joint(given * own, clamped(given), clamped(1.0 - given))
            # Masked lanes add nothing, even if their slope is not finite.
            total += tl.where(mask, share, 0.0)
    tl.store(out + plane * size + i, narrow(total, out, UPCAST), mask=ok)
