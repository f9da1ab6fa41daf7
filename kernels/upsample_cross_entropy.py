"""Cross-entropy of bilinearly upsampled logits: loss and low-resolution gradient in one pass over the pixels.

A program owns a block of source pixels. It walks over the output pixels between them, keeps the gradient of
the stretched rows in registers, and reduces it to the source width once per source row. Nothing of the
output's size is written, there are no atomics, and two runs agree bit for bit. Both blocks compute the pixels
between them.
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
"""Number of classes times number of outputs of a tile; half of it for soft labels, which are a tile
themselves."""

ROWS = 4
"""Number of source rows of a program; the loop has one more."""

COLUMNS = 16


def upsample_cross_entropy_fwd(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    align_corners: bool,
    temperature: float,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sum of the losses, sum of the weights, gradient or [0], losses or [0])``; the low-level op of the
    same name."""
    logits, labels = logits.contiguous(), labels.contiguous()
    batch, classes, h, w = logits.shape
    height, width = labels.shape[-2:]
    soft = labels.is_floating_point()
    device = logits.device
    full = torch.float32
    if class_weight is None:
        class_weight = torch.ones(classes, dtype=full, device=device)
    padded = padded_classes(classes)
    outputs = max(16, TILE // padded // (2 if soft else 1))
    owned = owned_columns(outputs, w, width, COLUMNS)
    grid = (batch * triton.cdiv(h, ROWS) * triton.cdiv(w, owned),)
    grad = torch.empty(logits.shape if gradient else (0,), dtype=full, device=device)
    losses = torch.empty((batch, height, width) if per_pixel else (0,), dtype=full, device=device)
    partial = torch.empty((2, *grid), dtype=full, device=device)
    with on_device(logits):
        rows, columns = stretches(logits, (h, w), (height, width), align_corners)
        upsampled_losses[grid](
            logits,
            labels.float() if soft else labels,
            class_weight.to(full).contiguous(),
            logits if pixel_weight is None else pixel_weight.to(full).contiguous(),
            grad,
            losses,
            partial,
            rows.share,
            rows.start,
            *columns,
            classes,
            h,
            w,
            height,
            width,
            1 / temperature,
            label_smoothing,
            ignore_index,
            SOFT=soft,
            WEIGHTED=pixel_weight is not None,
            GRADIENT=gradient,
            PER_PIXEL=per_pixel,
            OWNED=owned,
            KP=padded,
            BR=ROWS,
            BC=COLUMNS,
            BX=outputs,
            num_warps=8 if padded * outputs >= TILE else 4,  # with half a tile, 8 warps would spill
        )
    loss, norm = partial.sum(1, dtype=torch.float64).to(full).unbind()
    if soft:
        norm = torch.full_like(norm, batch * height * width)
    return loss.clone(), norm.clone(), grad, losses


@triton.jit
def upsampled_losses(
    logits,
    labels,
    class_weight,
    pixel_weight,
    grad,
    losses,
    partial,
    row_share,
    row_start,
    column_first,
    column_share,
    column_start,
    classes,
    h,
    w,
    height,
    width,
    sharpness,
    smoothing,
    ignore,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    OWNED: tl.constexpr,
    KP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, ``BR`` source rows and ``OWNED`` source columns; tiles are [KP classes, BX
    outputs]."""
    b, r0, c0 = program_block(h, w, BR, OWNED)
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    c = c0 + tl.arange(0, BC)  # [BC]
    plane = tl.cast(h, tl.int64) * w
    image = logits + b * classes * plane
    # Padded classes have weight 0, so that no label, smoothed or not, counts for them.
    weight = tl.load(class_weight + k, mask=k_ok, other=0.0)  # [KP]
    sharp = 1.0 - smoothing
    smooth = smoothing / classes
    begin, end = outputs_around(column_start, c0, w, OWNED)
    loss = tl.zeros((BX,), tl.float32)  # [BX]
    norm = tl.zeros((BX,), tl.float32)  # [BX]
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
            mask = k_ok[:, None] & ok[None, :]  # [KP, BX]
            planes = image + k[:, None] * plane  # [KP, 1]
            # The two source rows are stretched once, for all output rows between them.
            # [KP, BX] each
            top, bottom = stretched_rows(planes, r, h, w, first[None, :], share[None, :], mask)
            # Pixels between two blocks add to the gradient of both, but to the loss of only one.
            mine = ok & (first >= c0) & (r >= r0)  # [BX]
            by_top = tl.zeros((KP, BX), tl.float32)  # [KP, BX]
            by_bottom = tl.zeros((KP, BX), tl.float32)  # [KP, BX]
            for y in range(top_y, end_y):
                row = tl.load(row_share + y)
                # The softmax is float32, relative to the largest logit; padded classes have no term.
                value = (top + row * (bottom - top)) * sharpness  # [KP, BX]
                best = tl.max(tl.where(k_ok[:, None], value, float("-inf")), 0)  # [BX]
                e = tl.where(k_ok[:, None], tl.exp(value - best[None, :]), 0.0)  # [KP, BX]
                total = tl.sum(e, 0)  # [BX]
                at = (b * height + y) * width + x  # [BX]
                # Hard and soft labels become the same weighted target, so that the rest is shared code.
                if SOFT:
                    q_at = labels + ((b * classes + k)[:, None] * height + y) * width + x[None, :]  # [KP, BX]
                    q = tl.load(q_at, mask=mask, other=0.0)  # [KP, BX]
                    target = weight[:, None] * (smooth + sharp * q)  # [KP, BX]
                    pixel = tl.where(ok, 1.0, 0.0)  # [BX]
                else:
                    label = tl.load(labels + at, mask=ok, other=ignore).to(tl.int64)  # [BX]
                    valid = ok & (label != ignore) & (label >= 0) & (label < classes)  # [BX]
                    hit = k[:, None] == label.to(tl.int32)[None, :]  # [KP, BX]
                    target = weight[:, None] * tl.where(hit, smooth + sharp, smooth)  # [KP, BX]
                    pixel = tl.where(valid, 1.0, 0.0)  # [BX]
                    norm += tl.where(mine & valid, tl.sum(tl.where(hit, weight[:, None], 0.0), 0), 0.0)
                if WEIGHTED:
                    pixel *= tl.load(pixel_weight + at, mask=ok, other=0.0)
                # Weighted targets do not add up to 1, so the log-sum-exp is multiplied by their sum.
                mass = tl.sum(target, 0)  # [BX]
                # a value without weight may be infinite
                own = tl.sum(tl.where(target == 0.0, 0.0, target * value), 0)  # [BX]
                term = pixel * (mass * (best + tl.log(total)) - own)  # [BX]
                loss += tl.where(mine, term, 0.0)
                if PER_PIXEL:
                    tl.store(losses + at, term, mask=mine)
                # The gradient keeps the width of the output for all rows between two source rows.
                if GRADIENT:
                    # [KP, BX]
                    g = sharpness * ((pixel * mass / total)[None, :] * e - pixel[None, :] * target)
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
            planes = grad + (b * classes + k)[:, None] * plane  # [KP, 1]
            store_gradient_row(planes, c, r, h, w, upper, lower, here)
            carried = lower
    # Each program writes its own sums, which are added later in a fixed order: two runs agree bit for bit.
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))
    tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(norm, 0))
