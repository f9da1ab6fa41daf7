"""DeepLab's head. The library multiplies the features by the taps of all branches at once, and a kernel
shifts the rows of that product and adds them to the logits. In the backward a kernel shifts the gradient into
rows for two products."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastuda.kernels._common import PANEL_BYTES, add_product, on_device, product

BLOCK = 256
"""Number of pixels of a program."""


class Taps:
    """The taps of all branches that reach into an image of ``h`` x ``w``. The middle taps are merged into
    one, which is the last.

    Taps of equal dilations are not merged.
    """

    def __init__(self, dilations: tuple[int, ...], h: int, w: int, device: torch.device) -> None:
        around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        kept, shifts = [], []
        for r, d in enumerate(dilations):
            for position, (i, j) in enumerate(around):
                if (i or j) and abs(i * d) < h and abs(j * d) < w:
                    kept.append(9 * r + position)
                    shifts.append((i * d, j * d))
        shifts.append((0, 0))
        self.count = len(shifts)
        self.kept = torch.tensor(kept, dtype=torch.int64).to(device)
        """Indices into the 9 taps of each branch, without the middle."""
        self.shifts = torch.tensor(shifts, dtype=torch.int32).to(device)
        """[T, 2]: rows and columns from an output to the features that the tap reads."""
        self.reach = max((abs(i) * w + abs(j) for i, j in shifts), default=0)
        """Largest distance from an output to these features in pixels, counted along the rows of a batch."""

    def gather(self, weight: Tensor) -> Tensor:
        """Weights [branches, 3, 3, K, C] as [T K, C]."""
        nine = weight.reshape(-1, *weight.shape[3:])
        rows = torch.cat([nine.index_select(0, self.kept), nine[4::9].sum(0, keepdim=True)])
        return rows.flatten(0, 1)

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """[T K, C] as weights [branches, 3, 3, K, C]: the adjoint of :meth:`gather`."""
        taps = rows.unflatten(0, (self.count, -1))
        nine = rows.new_zeros(like.shape).flatten(0, 2)
        nine.index_copy_(0, self.kept, taps[:-1])
        nine[4::9] = taps[-1]
        return nine.reshape(like.shape).to(like.dtype)


@lru_cache(maxsize=256)
def taps_of(dilations: tuple[int, ...], h: int, w: int, device: torch.device) -> Taps:
    """The taps, cached because every training step needs the same ones."""
    return Taps(dilations, h, w, device)


def pixel_rows(features: Tensor) -> Tensor:
    """[B, C, h, w] as [B h w, C]; a view for channels-last features."""
    return features.permute(0, 2, 3, 1).contiguous().flatten(0, 2)


def panel_pixels(x: Tensor, rows: int, element: int) -> int:
    """Number of pixels for which a product of ``rows`` rows takes no more memory than the features ``x``."""
    most = max(x.numel() * x.element_size(), PANEL_BYTES) // (rows * element)
    return min(max(triton.cdiv(most, 8) * 8 - 8, 8), x.shape[0])


def aspp_fwd(features: Tensor, weight: Tensor, bias: Tensor | None, dilations: list[int]) -> Tensor:
    """Logits [B, K, h, w]; the low-level op of the same name."""
    b, _, h, w = features.shape
    classes = weight.shape[3]
    taps = taps_of(tuple(dilations), h, w, features.device)
    x, a = pixel_rows(features), taps.gather(weight).to(features.dtype)
    sums = torch.zeros(b, classes, h, w, dtype=torch.float32, device=x.device)
    if bias is not None:
        sums += bias.float()[:, None, None]
    pixels = panel_pixels(x, a.shape[0], 4) if x.shape[0] else 1
    memory = sums.new_empty(a.shape[0] * pixels)
    with on_device(x):
        for start in range(0, x.shape[0], pixels):
            count = min(pixels, x.shape[0] - start)
            products = memory[: a.shape[0] * count].view(a.shape[0], count)
            product(a, x[start : start + count].t(), products)
            first = max(start - taps.reach, 0)
            blocks = triton.cdiv(min(start + count + taps.reach, x.shape[0]) - first, BLOCK)
            sum_taps[(blocks, classes)](
                products, taps.shifts, sums, first, start, count, x.shape[0], h, w,
                classes, taps.count, BN=BLOCK, num_warps=4,
            )  # fmt: skip
    return sums.to(features.dtype).contiguous(memory_format=suggest_memory_format(features))


def aspp_bwd(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    dilations: list[int],
    for_features: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """``(gradient of the features or [0], of the weights or [0])``; the low-level op of the same name."""
    b, c, h, w = features.shape
    classes = weight.shape[3]
    taps = taps_of(tuple(dilations), h, w, features.device)
    x, a = pixel_rows(features), taps.gather(weight).to(features.dtype)
    grad = grad.to(x.dtype).contiguous()
    by_x = torch.empty_like(x) if for_features else x.new_empty(0)
    by_a = torch.zeros(a.shape if for_weight else (0,), dtype=torch.float32, device=x.device)
    pixels = panel_pixels(x, a.shape[0], x.element_size()) if x.shape[0] else 1
    memory = x.new_empty(a.shape[0] * pixels)
    with on_device(x):
        for start in range(0, x.shape[0], pixels):
            count = min(pixels, x.shape[0] - start)
            moved = memory[: a.shape[0] * count].view(a.shape[0], count)
            spread_taps[(triton.cdiv(count, BLOCK), a.shape[0])](
                grad, taps.shifts, moved, start, count, h, w, classes, BN=BLOCK, num_warps=4
            )  # fmt: skip
            if for_features:
                torch.mm(moved.t(), a, out=by_x[start : start + count])
            if for_weight:
                add_product(by_a, moved, x[start : start + count])
    if for_features:
        by_x = by_x.view(b, h, w, c).permute(0, 3, 1, 2)
    return by_x, taps.scatter(by_a, weight) if for_weight else weight.new_empty(0)


@triton.jit
def pixel_place(p, h, w):
    """Image, row and column of pixels [BN] that are counted along the rows of a batch."""
    return p // w // h, p // w % h, p % w


@triton.jit
def sum_taps(
    products, shifts, sums, first, start, count, pixels, h, w, classes, taps, BN: tl.constexpr
):  # fmt: skip
    """Add products [T K, count] to ``BN`` logits of a class from pixel ``first`` on: those of the taps whose
    features are among the ``count`` pixels from ``start`` on."""
    k = tl.program_id(1)
    # Pixels are int64, because offsets into the logits computed from them exceed 32 bits.
    p = first + tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    ok = p < pixels  # [BN]
    image, y, x = pixel_place(p, h, w)  # [BN] each
    to = sums + ((image * classes + k) * h + y) * w + x  # [BN]
    # The logits already hold the sums of earlier panels, because the taps of a pixel reach into several.
    total = tl.load(to, mask=ok, other=0.0)  # [BN]
    # A tap must stay inside the image as well as the panel, because rows and images lie end to end.
    for t in range(taps):
        dy = tl.load(shifts + 2 * t)
        dx = tl.load(shifts + 2 * t + 1)
        q = p + dy * w + dx - start  # [BN]
        # [BN]
        inside = ok & (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w) & (q >= 0) & (q < count)
        row = (t * classes + k).to(tl.int64) * count
        total += tl.load(products + row + q, mask=inside, other=0.0)
    tl.store(to, total, mask=ok)


@triton.jit
def spread_taps(
    grad, shifts, moved, start, count, h, w, classes, BN: tl.constexpr
):  # fmt: skip
    """``BN`` pixels of a row of ``moved`` [T K, count]: the gradient of the logit to which a tap carries the
    features of the pixel, for one class; 0 if that logit is outside the image."""
    row = tl.program_id(1).to(tl.int64)
    t, k = row // classes, row % classes
    q = tl.program_id(0) * BN + tl.arange(0, BN)  # [BN]
    ok = q < count  # [BN]
    # The shift is reversed, from the features to the output that they reach through this tap.
    image, y, x = pixel_place(start + q.to(tl.int64), h, w)  # [BN] each
    y -= tl.load(shifts + 2 * t)
    x -= tl.load(shifts + 2 * t + 1)
    inside = ok & (y >= 0) & (y < h) & (x >= 0) & (x < w)  # [BN]
    # Without such an output a 0 is written, because the following products read the whole row.
    g = tl.load(grad + ((image * classes + k) * h + y) * w + x, mask=inside, other=0.0)  # [BN]
    tl.store(moved + row * count + q, g, mask=ok)
