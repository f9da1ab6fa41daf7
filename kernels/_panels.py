"""What the gradients share: row panels of a matrix that is never stored whole, and the way back through the
normalisation.

A panel holds as many rows as fit in :data:`PANEL_BYTES`: a Triton kernel fills it (tile product and epilogue
in registers), two library products consume it while it is in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, PANEL_BYTES, narrow, tile_shape


class Panel:
    """Scratch for ``count`` matrices of a few rows and up to ``columns`` columns, used again and again."""

    def __init__(self, like: Tensor, columns: int, channels: int, rows: int, count: int = 1) -> None:
        self.stride = triton.cdiv(columns, 8) * 8
        """Rows begin on 16 bytes."""
        block = tile_shape(like)["BM"]
        fit = min(PANEL_BYTES // (count * self.stride * like.element_size()), PANEL_BYTES // (6 * channels))
        self.rows = min(max(fit // block, 1) * block, triton.cdiv(rows, block) * block)
        self.memory = like.new_empty(count, self.rows, self.stride)

    def view(self, rows: int, columns: int, index: int = 0) -> Tensor:
        """[rows, columns] of one of the matrices."""
        return self.memory[index, :rows, :columns]


def project(
    y: Tensor,
    x: Tensor,
    inv_norm: Tensor,
    out: Tensor,
    rest: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """``out = y - u (u . y)`` per row [R, C] with ``u = x inv_norm``: the gradient of the normalisation.

    ``y`` is float32. ``rest = (g, v, alpha)`` adds ``(1 - alpha) g + alpha v``.
    """
    g, v, alpha = rest or (x, y, 0.0)
    rows, channels = y.shape
    width = min(triton.next_power_of_2(channels), 2048)
    height = 64 if INTERPRETED else 2048 // width
    project_rows[(triton.cdiv(rows, height),)](
        y,
        x,
        inv_norm,
        out,
        g,
        v,
        alpha,
        rows,
        channels,
        REST=rest is not None,
        UPCAST=INTERPRETED,
        BR=height,
        BC=width,
        num_warps=4,
    )


@triton.jit
def project_rows(
    y,
    x,
    inv_norm,
    out,
    g,
    v,
    alpha,
    rows,
    channels,
    REST: tl.constexpr,
    UPCAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``BR`` rows per program."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    inv = tl.load(inv_norm + row, mask=ok, other=0.0)
    c = tl.arange(0, BC)
    along = tl.zeros((BR, BC), tl.float32)
    for start in range(0, channels, BC):
        inside = ok[:, None] & (c < channels - start)[None, :]
        at = row[:, None] * channels + start + c[None, :]
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inv[:, None]
        along += u * tl.load(y + at, mask=inside, other=0.0)
    dot = tl.sum(along, 1)
    for start in range(0, channels, BC):
        inside = ok[:, None] & (c < channels - start)[None, :]
        at = row[:, None] * channels + start + c[None, :]
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inv[:, None]
        value = tl.load(y + at, mask=inside, other=0.0) - u * dot[:, None]
        if REST:
            value += (1 - alpha) * tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
            value += alpha * tl.load(v + at, mask=inside, other=0.0)
        tl.store(out + at, narrow(value, out, UPCAST), mask=inside)
