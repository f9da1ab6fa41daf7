"""Row temperatures ``std + 1e-10`` of a similarity that is never stored; 1 where the deviation is rounding.

Two ways, chosen by cost. The variance of row ``i`` is ``q_i^T Cov(keys) q_i`` (design identity 2): two thin
products when the keys are many and narrow. Otherwise one pass over similarity tiles, each reduced to a mean
and a sum of squared deviations per row and per column, merged by Chan's formula; when query and key are one
tensor the upper half of the tiles gives everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import (
    EPS_STD,
    INTERPRETED,
    PANEL_BYTES,
    Side,
    divides,
    grouped,
    tile_product,
    tile_shape,
)

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Deviation of equal similarities that were rounded, at most, over their size or 1."""


def ones(side: Side) -> Tensor:
    """The temperatures without contrast normalisation."""
    return torch.ones_like(side.row)


def covariance_pays(channels: int, keys: int, dtype: torch.dtype) -> bool:
    """Four float32 products of N x C x C against one tile pass of N x N x C, in float32 or (about twelve
    times faster) on half-precision tensor cores."""
    return keys >= (4 if dtype == torch.float32 else 48) * channels


def pair_temperatures(source: Side, target: Side, similarity: str) -> tuple[Tensor, Tensor]:
    """``([B, N], [B, M])``: of the rows source -> target and of the rows target -> source."""
    n, (m, c) = source.query.shape[1], target.query.shape[1:]
    if similarity == "kl" or covariance_pays(c, min(n, m), source.query.dtype):
        return _by_covariance(source, target, similarity), _by_covariance(target, source, similarity)
    return _by_tiles(source, target)


def self_temperatures(side: Side, similarity: str) -> Tensor:
    """[B, N] of the rows of an image against itself."""
    n, c = side.query.shape[1:]
    if similarity == "kl" or covariance_pays(c, n, side.query.dtype):
        return _by_covariance(side, side, similarity)
    return _by_tiles(side, None)[0]


def _by_covariance(query: Side, key: Side, similarity: str) -> Tensor:
    batch, n, c = query.query.shape
    m = key.key.shape[1]
    if m < 2:
        return ones(query)
    # Narrow covariances cost nothing in float64, and a peaked distribution needs it.
    dtype = torch.float64 if c <= 64 else torch.float32
    rows = max(1, PANEL_BYTES // (2 * c * dtype.itemsize))
    out = torch.empty_like(query.row)

    def unit(x: Tensor, scale: Tensor) -> Tensor:
        return x.to(dtype) * scale[:, None].to(dtype) if similarity == "cosine" else x.to(dtype)

    for b in range(batch):
        panels = list(zip(key.key[b].split(rows), key.row[b].split(rows), strict=True))
        mean = torch.stack([unit(x, r).sum(0) for x, r in panels]).sum(0) / m
        covariance = torch.zeros(c, c, dtype=dtype, device=out.device)
        for x, r in panels:
            centred = unit(x, r) - mean
            covariance.addmm_(centred.T, centred)
        covariance /= m - 1
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            q = unit(query.query[b, part], query.row[b, part])
            std = ((q @ covariance) * q).sum(1).clamp(min=0).sqrt().float()
            rounding = ROUNDING * (q @ mean).abs().clamp(min=1).float()
            out[b, part] = torch.where(std <= rounding, 1, std + EPS_STD)
    return out


def _by_tiles(source: Side, target: Side | None) -> tuple[Tensor, Tensor]:
    other = target or source
    batch, n, c = source.query.shape
    m = other.key.shape[1]
    shape = tile_shape(source.query)
    square = target is None
    if square:
        shape["BN"] = shape["BM"] = min(shape["BM"], shape["BN"])
    blocks, splits = triton.cdiv(n, shape["BM"]), triton.cdiv(m, shape["BN"])
    row_part = source.row.new_empty(2, batch, splits, n)
    col_part = row_part if square else source.row.new_empty(2, batch, blocks, m)
    tile_moments[(blocks * splits, batch)](
        source.query,
        other.key,
        source.row,
        other.row,
        row_part[0],
        row_part[1],
        col_part[0],
        col_part[1],
        n,
        m,
        c,
        blocks,
        splits,
        SQUARE=square,
        EVEN=divides(source.query, shape["BK"]),
        UPCAST=INTERPRETED,
        GROUP=8,
        **shape,
    )
    rows = _merged(row_part, n, m, shape["BN"])
    return rows, rows if square else _merged(col_part, m, n, shape["BM"])


def _merged(part: Tensor, length: int, total: int, width: int) -> Tensor:
    _, batch, count, _ = part.shape
    out = part.new_empty(batch, length)
    merge_moments[(triton.cdiv(length, 64), batch)](
        part[0],
        part[1],
        out,
        length,
        total,
        width,
        count,
        EPS=EPS_STD,
        ROUNDING=ROUNDING,
        BP=16,
        BL=64,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["blocks", "splits"])
def tile_moments(
    a,
    b,
    inv_a,
    inv_b,
    row_mean,
    row_m2,
    col_mean,
    col_m2,
    n,
    m,
    channels,
    blocks,
    splits,
    SQUARE: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Mean and sum of squared deviations of one cosine tile per row ([B, splits, N]) and column
    ([B, blocks, M]). ``SQUARE``: one image against itself, upper tiles only, columns fill the same arrays."""
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    if SQUARE:  # noqa: SIM102 (one is a constant, the other a tensor)
        if split < block:
            return
    batch = tl.program_id(1).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    cols = split * BN + tl.arange(0, BN)
    row_ok = rows < n
    col_ok = cols < m
    at_row = batch * n + tl.minimum(rows, n - 1)
    at_col = batch * m + tl.minimum(cols, m - 1)
    s = tile_product(a, b, at_row, at_col, channels, BM, BN, BK, EVEN, UPCAST)
    s = s * tl.load(inv_a + at_row)[:, None] * tl.load(inv_b + at_col)[None, :]

    count = tl.minimum(m - split * BN, BN).to(tl.float32)
    mean = tl.sum(tl.where(col_ok[None, :], s, 0.0), 1) / count
    d = tl.where(col_ok[None, :], s - mean[:, None], 0.0)
    to = (batch * splits + split) * n + rows
    tl.store(row_mean + to, mean, mask=row_ok)
    tl.store(row_m2 + to, tl.sum(d * d, 1), mask=row_ok)

    if SQUARE:  # the diagonal tile has spoken for its rows
        col_ok = col_ok & (split > block)
    count = tl.minimum(n - block * BM, BM).to(tl.float32)
    mean = tl.sum(tl.where(row_ok[:, None], s, 0.0), 0) / count
    d = tl.where(row_ok[:, None], s - mean[None, :], 0.0)
    to = (batch * blocks + block) * m + cols
    tl.store(col_mean + to, mean, mask=col_ok)
    tl.store(col_m2 + to, tl.sum(d * d, 0), mask=col_ok)


@triton.jit
def merge_moments(
    part_mean,
    part_m2,
    out,
    length,
    total,
    width,
    parts,
    EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BP: tl.constexpr,
    BL: tl.constexpr,
):
    """Temperatures from ``parts`` partial moments of up to ``width`` values each (Chan et al. 1979)."""
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BL + tl.arange(0, BL)
    ok = at < length
    p = tl.arange(0, BP)
    weighted = tl.zeros((BL,), tl.float32)
    for start in range(0, parts, BP):
        here = start + p
        count = tl.minimum(total - here * width, width).to(tl.float32)
        where = (batch * parts + here)[:, None] * length + at[None, :]
        mask = (here < parts)[:, None] & ok[None, :]
        weighted += tl.sum(tl.load(part_mean + where, mask=mask, other=0.0) * count[:, None], 0)
    mean = weighted / total
    m2 = tl.zeros((BL,), tl.float32)
    for start in range(0, parts, BP):
        here = start + p
        count = tl.minimum(total - here * width, width).to(tl.float32)
        where = (batch * parts + here)[:, None] * length + at[None, :]
        mask = (here < parts)[:, None] & ok[None, :]
        d = tl.load(part_mean + where, mask=mask, other=0.0) - mean[None, :]
        inner = tl.load(part_m2 + where, mask=mask, other=0.0)
        m2 += tl.sum(tl.where(mask, inner + d * d * count[:, None], 0.0), 0)
    std = tl.sqrt(m2 / tl.maximum(total - 1, 1).to(tl.float32))
    rounding = ROUNDING * tl.maximum(tl.abs(mean), 1.0)
    tl.store(out + batch * length + at, tl.where(std <= rounding, 1.0, std + EPS), mask=ok)
