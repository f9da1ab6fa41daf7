"""Parts that the gradients share: row panels of a matrix that is never stored whole, and the gradient of the
normalisation.

A panel holds as many rows as fit in :data:`PANEL_BYTES`. A Triton kernel fills it (tile product and epilogue
in registers), and two library products read it while it is in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import EPS_NORM, INTERPRETED, PANEL_BYTES, narrow, product, tile_shape


class Panel:
    """Reusable scratch for ``count`` matrices of a few rows and up to ``columns`` columns, and for
    ``products`` with as many rows in float32, which the library computes."""

    def __init__(
        self, like: Tensor, columns: int, channels: int, rows: int, count: int = 1, products: int = 0
    ) -> None:
        self.stride = triton.cdiv(columns, 16) * 16
        """A multiple of 16. Triton then stores 16 bytes at a time, if the mask is a multiple of 16 too, so
        kernels write zeros up to the stride."""
        block = tile_shape(like)["BM"]
        row = self.stride * (count * like.element_size() + 4 * products)
        # as much again for products: they are narrow, and the library needs rows for all multiprocessors
        fit = min((1 + (products > 0)) * PANEL_BYTES // row, PANEL_BYTES // (6 * channels))
        self.rows = min(max(fit // block, 1) * block, triton.cdiv(rows, block) * block)
        self.memory = like.new_empty(count, self.rows, self.stride)
        self.products = like.new_empty(products, self.rows, self.stride, dtype=torch.float32)

    def view(self, rows: int, columns: int, index: int = 0) -> Tensor:
        """[rows, columns] of one of the matrices."""
        return self.memory[index, :rows, :columns]

    def product(self, a: Tensor, b: Tensor, first: int = 0, index: int = 0) -> Tensor:
        """``a @ b.T`` [rows, columns] in float32, written from column ``first`` on, by the library."""
        out = self.products[index, : a.shape[0], : b.shape[0]]
        product(a, b[first:].T, out[:, first:])
        return out


def project(
    y: Tensor,
    x: Tensor,
    inv_norm: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    """``out = y - u (u . y)`` per row [R, C] with ``u = x inv_norm``: the gradient of the normalisation.

    ``y`` is float32. If ``scale`` ([] float32) is given, ``y`` is that many times too large.
    """
    rows, channels = y.shape
    width = min(triton.next_power_of_2(channels), 2048)
    height = 64 if INTERPRETED else 2048 // width
    project_rows[(triton.cdiv(rows, height),)](
        y,
        x,
        inv_norm,
        out,
        y if scale is None else scale,
        rows,
        channels,
        SCALED=scale is not None,
        UPCAST=INTERPRETED,
        BR=height,
        BC=width,
        num_warps=4,
    )


def panel_scale(bound: Tensor) -> Tensor:
    """The power of two that scales ``bound`` [] to at most half of float16's range, as float32 on its
    device."""
    _, exponent = torch.frexp(bound)  # bound < 2 ** exponent
    return torch.ldexp(torch.ones_like(bound), (15 - exponent).clamp(-100, 100))


def without_vanishing(inv_norm: Tensor) -> Tensor:
    """Inverse norms, with 0 for vanishing features: theirs would use up the range of float16."""
    return torch.where(inv_norm < 0.5 / EPS_NORM, inv_norm, 0)


@triton.jit
def saturate(x, like):
    """float32 ``x``, clamped to the range of float16 if pointer ``like`` has that type."""
    if like.dtype.element_ty == tl.float16:
        # A NaN stays NaN: it must not turn into a number that looks valid.
        x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)  # as x
    return x


@triton.jit(do_not_specialize_on_alignment=["inv_norm"])
def project_rows(
    y,
    x,
    inv_norm,
    out,
    scale,
    rows,
    channels,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``BR`` rows per program."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    ok = row < rows  # [BR]
    inv = tl.load(inv_norm + row, mask=ok, other=0.0)  # [BR]
    c = tl.arange(0, BC)  # [BC]
    # The dot product needs all channels before any can be written, so they are read twice.
    along = tl.zeros((BR, BC), tl.float32)  # [BR, BC]
    for start in range(0, channels, BC):
        inside = ok[:, None] & (c < channels - start)[None, :]  # [BR, BC]
        at = row[:, None] * channels + start + c[None, :]  # [BR, BC]
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inv[:, None]  # [BR, BC]
        along += u * tl.load(y + at, mask=inside, other=0.0)
    # Threads reduce once, after the loop.
    dot = tl.sum(along, 1)  # [BR]
    for start in range(0, channels, BC):
        inside = ok[:, None] & (c < channels - start)[None, :]
        at = row[:, None] * channels + start + c[None, :]
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inv[:, None]
        value = tl.load(y + at, mask=inside, other=0.0) - u * dot[:, None]  # [BR, BC]
        if SCALED:
            value = value / tl.load(scale)
        tl.store(out + at, narrow(value, out, UPCAST), mask=inside)
