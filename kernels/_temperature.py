"""Row temperatures ``std + 1e-10`` of a similarity that is never stored; 1 where the deviation is only
rounding.

There are two ways, chosen by cost. The variance of row ``i`` is ``q_i^T Cov(keys) q_i``, which takes two thin
products if the keys are many and narrow. Otherwise one pass over similarity tiles (:mod:`._moments`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.kernels._common import EPS_STD, PANEL_BYTES, ROUNDING, Side
from fastuda.kernels._moments import tile_temperatures


def ones(side: Side) -> Tensor:
    """The temperatures without contrast normalisation: ones."""
    return torch.ones_like(side.row)


def covariance_pays(channels: int, keys: int, dtype: torch.dtype) -> bool:
    """Whether four float32 products of N x C x C cost less than one tile pass of N x N x C. The pass is in
    float32, or about twelve times faster on half-precision tensor cores."""
    return keys >= (4 if dtype == torch.float32 else 48) * channels


def pair_temperatures(
    source: Side, target: Side, similarity: str, library: bool = False
) -> tuple[Tensor, Tensor]:
    """``([B, N], [B, M])`` for the rows source -> target and for the rows target -> source. With ``library``
    the library multiplies, not the tiles; one image only."""
    n, (m, c) = source.query.shape[1], target.query.shape[1:]
    if similarity == "kl" or covariance_pays(c, min(n, m), source.query.dtype):
        return _by_covariance(source, target, similarity), _by_covariance(target, source, similarity)
    return tile_temperatures(source, target, library)


def self_temperatures(side: Side, similarity: str, library: bool = False) -> Tensor:
    """[B, N] for the rows of an image against itself; ``library`` as above."""
    n, c = side.query.shape[1:]
    if similarity == "kl" or covariance_pays(c, n, side.query.dtype):
        return _by_covariance(side, side, similarity)
    return tile_temperatures(side, None, library)[0]


def _by_covariance(query: Side, key: Side, similarity: str) -> Tensor:
    batch, n, c = query.query.shape
    m = key.key.shape[1]
    if m < 2:
        return ones(query)
    # float64 costs almost nothing for narrow covariances, and peaked distributions need it.
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
