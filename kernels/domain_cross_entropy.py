"""The domain loss of upsampled discriminator logits: labels, loss and low-resolution gradient in one pass
over the pixels.

As :mod:`fastuda.kernels.upsample_cross_entropy`, but the labels are computed from the upsampled segmentation
logits where they are used: neither they nor their zero half are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import on_device, padded_classes
from fastuda.kernels._upsample import (
    column_weights,
    output_columns,
    outputs_around,
    owned_columns,
    program_block,
    store_gradient_row,
    stretched_rows,
    stretches,
)

TILE = 1024
"""Number of domain channels times number of outputs of a tile."""

ROWS = 4
"""Number of source rows of a program; the loop has one more."""

COLUMNS = 16


def domain_cross_entropy_fwd(
    domain_logits: Tensor,
    seg_logits: Tensor,
    offset: int,
    height: int,
    width: int,
    align_corners: bool,
    temperature: float,
    clip: float,
    hard_threshold: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``(sum of the losses, gradient of the domain logits or [0])`` in float32; the low-level op of the same
    name."""
    domain_logits, seg_logits = domain_logits.contiguous(), seg_logits.contiguous()
    batch, channels, h, w = domain_logits.shape
    _, classes, seg_h, seg_w = seg_logits.shape
    device = domain_logits.device
    padded = padded_classes(channels)
    outputs = max(16, TILE // padded)
    owned = owned_columns(outputs, w, width, COLUMNS)
    grid = (batch * triton.cdiv(h, ROWS) * triton.cdiv(w, owned),)
    grad = torch.empty(domain_logits.shape if gradient else (0,), dtype=torch.float32, device=device)
    partial = torch.empty(grid, dtype=torch.float32, device=device)
    with on_device(domain_logits):
        size = (height, width)
        rows, columns = stretches(domain_logits, (h, w), size, align_corners)
        seg_rows, seg_columns = stretches(seg_logits, (seg_h, seg_w), size, align_corners)
        encoded_losses[grid](
            domain_logits,
            seg_logits,
            grad,
            partial,
            rows.share,
            rows.start,
            *columns,
            seg_rows.first,
            seg_rows.share,
            seg_columns.first,
            seg_columns.share,
            channels,
            classes,
            offset,
            h,
            w,
            seg_h,
            seg_w,
            width,
            1 / temperature,
            clip if hard_threshold is None else hard_threshold,
            HARD=hard_threshold is not None,
            GRADIENT=gradient,
            OWNED=owned,
            KP=padded,
            BR=ROWS,
            BC=COLUMNS,
            BX=outputs,
            num_warps=8,
        )
    return partial.sum(dtype=torch.float64).float(), grad


@triton.jit
def encoded_losses(
    domain,
    seg,
    grad,
    partial,
    row_share,
    row_start,
    column_first,
    column_share,
    column_start,
    seg_row_first,
    seg_row_share,
    seg_column_first,
    seg_column_share,
    channels,
    classes,
    offset,
    h,
    w,
    seg_h,
    seg_w,
    width,
    sharpness,
    level,
    HARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    OWNED: tl.constexpr,
    KP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, ``BR`` source rows and ``OWNED`` source columns of the domain logits; tiles are
    [KP channels, BX outputs]. ``level`` clips soft labels, or is the smallest probability of hard labels."""
    b, r0, c0 = program_block(h, w, BR, OWNED)
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < channels  # [KP]
    # The classes of the labels are one half of the domain channels; the labels of the other half are 0.
    s = k - offset  # [KP]
    s_ok = (s >= 0) & (s < classes)  # [KP]
    c = c0 + tl.arange(0, BC)  # [BC]
    plane = tl.cast(h, tl.int64) * w
    image = domain + b * channels * plane
    seg_planes = seg + (b * classes + s)[:, None] * tl.cast(seg_h, tl.int64) * seg_w  # [KP, 1]
    begin, end = outputs_around(column_start, c0, w, OWNED)
    loss = tl.zeros((BX,), tl.float32)  # [BX]
    # The gradient of the next source row is carried over, so that each row is written once, without atomics.
    carried = tl.zeros((KP, BC), tl.float32)  # [KP, BC]
    # The loop starts at the row before the block, because outputs below that row reach into the block.
    for r in range(tl.maximum(r0 - 1, 0), tl.minimum(r0 + BR, h)):
        upper = carried  # [KP, BC]
        lower = tl.zeros((KP, BC), tl.float32)  # [KP, BC]
        top_y = tl.load(row_start + r)
        end_y = tl.load(row_start + r + 1)
        for x0 in range(begin, end, BX):
            x, ok, first, share = output_columns(x0, end, column_first, column_share, BX)  # [BX] each
            seg_first = tl.load(seg_column_first + x, mask=ok, other=0)[None, :]  # [1, BX]
            seg_share = tl.load(seg_column_share + x, mask=ok, other=0.0)[None, :]  # [1, BX]
            mask = k_ok[:, None] & ok[None, :]  # [KP, BX]
            seg_mask = s_ok[:, None] & ok[None, :]  # [KP, BX]
            planes = image + k[:, None] * plane  # [KP, 1]
            # The two source rows are stretched once, for all output rows between them.
            # [KP, BX] each
            top, bottom = stretched_rows(planes, r, h, w, first[None, :], share[None, :], mask)
            # Pixels between two blocks add to the gradient of both, but to the loss of only one.
            mine = ok & (first >= c0) & (r >= r0)  # [BX]
            by_top = tl.zeros((KP, BX), tl.float32)  # [KP, BX]
            by_bottom = tl.zeros((KP, BX), tl.float32)  # [KP, BX]
            for y in range(top_y, end_y):
                seg_r = tl.load(seg_row_first + y)
                # Labels are computed where they are used, at the output pixel: no plane of them is written.
                # [KP, BX] each
                a, z = stretched_rows(seg_planes, seg_r, seg_h, seg_w, seg_first, seg_share, seg_mask)
                z = a + tl.load(seg_row_share + y) * (z - a)
                # Channels without a class are -inf, so their label is 0.
                z = tl.where(s_ok[:, None], z * sharpness, float("-inf"))
                best = tl.max(z, 0)  # [BX]
                q = tl.exp(z - best[None, :])  # [KP, BX]
                q /= tl.sum(q, 0)[None, :]
                if HARD:
                    # The lowest of equal classes is the label; there is none if its probability is too low.
                    guess = tl.min(tl.where((z == best[None, :]) & s_ok[:, None], k[:, None], KP), 0)  # [BX]
                    q = tl.where((k[:, None] == guess[None, :]) & (q >= level), 1.0, 0.0)
                else:
                    q = tl.where(q > level, level, q)
                row = tl.load(row_share + y)
                # The loss is float32, relative to the largest logit; padded channels have no term.
                value = top + row * (bottom - top)  # [KP, BX]
                best = tl.max(tl.where(k_ok[:, None], value, float("-inf")), 0)  # [BX]
                e = tl.where(k_ok[:, None], tl.exp(value - best[None, :]), 0.0)  # [KP, BX]
                total = tl.sum(e, 0)  # [BX]
                # Clipped labels do not add up to 1, so the log-sum-exp is multiplied by their sum.
                mass = tl.sum(q, 0)  # [BX]
                loss += tl.where(mine, mass * (best + tl.log(total)) - tl.sum(q * value, 0), 0.0)
                # The gradient keeps the width of the output for all rows between two source rows.
                if GRADIENT:
                    g = tl.where(ok[None, :], (mass / total)[None, :] * e - q, 0.0)  # [KP, BX]
                    by_top += (1.0 - row) * g
                    by_bottom += row * g
            # A product with the column weights reduces it to the source width, once per source row.
            if GRADIENT:
                hat = column_weights(first, share, w, c)  # [BX, BC]
                upper = tl.dot(by_top, hat, upper, input_precision="tf32x3")
                lower = tl.dot(by_bottom, hat, lower, input_precision="tf32x3")
        # Other programs own the columns after this program's, and the row before the block.
        if GRADIENT:
            here = k_ok[:, None] & ((c < c0 + OWNED) & (c < w) & (r >= r0))[None, :]  # [KP, BC]
            planes = grad + (b * channels + k)[:, None] * plane  # [KP, 1]
            store_gradient_row(planes, c, r, h, w, upper, lower, here)
            carried = lower
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))
