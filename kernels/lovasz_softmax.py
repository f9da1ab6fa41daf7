"""Lovasz-Softmax directly from low-resolution logits. It processes as many classes at once as fit into the
memory of the panels, so that no full-resolution logits are stored.

The errors of a class are sorted as 32-bit keys that also say whether the pixel belongs to the class, so
nothing is gathered after the sort. The host reads nothing from the device, so it never waits. The gradient is
gathered at low resolution, without atomics: two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels import _class_planes
from fastuda.kernels._common import PANEL_BYTES, on_device

PIXEL_BYTES = 28
"""Bytes per pixel and sorted class: its key before and after the sort, its index as torch's sort returns it
and as it uses it inside, and its number of hits or its slope."""


def lovasz_softmax_fwd(
    x: Tensor, labels: Tensor, from_logits: bool, align_corners: bool, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """``(loss, its gradient or [0])`` in float32; the low-level op of the same name."""
    x, labels = x.contiguous(), labels.contiguous()
    classes = x.shape[1]
    valid = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    labels = torch.where(valid, labels, -1).int()
    options = dict(dtype=torch.float32, device=x.device)
    grad = torch.zeros(x.shape if gradient else (0,), **options)
    if not labels.numel():
        return torch.zeros((), **options), grad
    group = min(classes, max(1, 2 * PANEL_BYTES // (PIXEL_BYTES * labels.numel())))
    partial = torch.empty(classes, triton.cdiv(labels.numel(), _class_planes.OUTPUTS), **options)
    sizes = torch.empty(classes, dtype=torch.int32, device=x.device)
    with on_device(x):
        upsampled = _class_planes.Upsampled(x, labels, from_logits, align_corners)
        inner = torch.zeros(labels.shape if gradient else (0,), **options)
        for first in range(0, classes, group):
            part = slice(first, min(first + group, classes))
            keys = upsampled.keys(first, part.stop - first)
            slopes = _slopes(keys, partial[part], sizes[part], labels.shape, gradient)
            if gradient and from_logits:
                upsampled.shrink(first, slopes, grad)
                upsampled.add_inner(first, slopes, inner)
            elif gradient:
                grad[:, part] = slopes.transpose(0, 1)
        if gradient and from_logits:  # through the softmax: p_c (slope_c - sum_k p_k slope_k)
            upsampled.shrink(0, inner.expand(classes, *inner.shape), grad, less=True)
        present = (sizes > 0).sum().clamp(min=1)
        if gradient:
            grad /= present
        return (partial.sum(dtype=torch.float64) / present).float(), grad


def _slopes(keys: Tensor, partial: Tensor, sizes: Tensor, shape: torch.Size, gradient: bool) -> Tensor:
    """For some classes [G]: the slope of the loss with respect to the probabilities [G, B, H, W], or [0], the
    parts of the loss, and the number of pixels of each class. The slopes of a class without pixels are 0.

    All pixels are sorted, although slopes are 0 after the last pixel of the class: skipping them would need a
    device sync for their number.
    """
    count, pixels = keys.shape
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    hits = (keys & 1).cumsum(1, dtype=torch.int32)
    slopes = torch.empty((count, *shape) if gradient else (0,), dtype=torch.float32, device=keys.device)
    jaccard_slopes[(triton.cdiv(pixels, _class_planes.OUTPUTS), count)](
        keys,
        order,
        hits,
        slopes,
        partial,
        sizes,
        pixels,
        GRADIENT=gradient,
        BX=_class_planes.OUTPUTS,
        num_warps=4,
    )
    return slopes


@triton.jit
def jaccard_slopes(keys, order, hits, slopes, partial, sizes, n, GRADIENT: tl.constexpr, BX: tl.constexpr):
    """A program per ``BX`` sorted pixels and class: differences of the Jaccard loss along them, computed
    without cancellation, with the sign of the error's derivative. The last of ``hits`` is the number of
    pixels of the class."""
    c = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BX + tl.arange(0, BX)  # [BX]
    ok = i < n  # [BX]
    own = tl.load(hits + c * n + n - 1)
    key = tl.load(keys + c * n + i, mask=ok, other=-(2**31)).to(tl.uint32, bitcast=True) ^ 0x80000000  # [BX]
    mine = (key & 1) != 0  # [BX]
    before = tl.load(hits + c * n + i, mask=ok, other=0)  # [BX]
    # Counts are subtracted as integers, exactly; only their quotients are float32.
    union = (own + (i + 1 - before)).to(tl.float32)  # [BX]
    step = tl.where(mine, 1.0, (own - before).to(tl.float32) / tl.maximum(union - 1.0, 1.0)) / union  # [BX]
    if GRADIENT:
        to = slopes + c * n + tl.load(order + c * n + i, mask=ok, other=0)  # [BX]
        tl.store(to, tl.where(mine, -step, step), mask=ok)
    # Each program adds its part of the loss; torch adds the parts in float64 and in a fixed order.
    error = (key >> 1).to(tl.float32, bitcast=True)  # [BX]
    part = tl.sum(tl.where(ok, step * error, 0.0), 0)
    tl.store(partial + c * tl.num_programs(0) + tl.program_id(0), part)
    if tl.program_id(0) == 0:
        tl.store(sizes + c, own)
