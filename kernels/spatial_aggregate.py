"""Spatial aggregation in row panels: a fused kernel computes the weights, and library products read them in
L2.

No log-sum-exp pass is needed first: a pixel is its own best match, so the largest similarity of a row is
known in advance, and the kernel sums the weights as it computes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.kernels import _temperature
from fastuda.kernels._aggregate_divergence import divergence_gradient
from fastuda.kernels._aggregate_narrow import mixed, mixed_gradient
from fastuda.kernels._aggregate_symmetric import symmetric_gradient
from fastuda.kernels._aggregate_weights import fill_weights, own_similarity
from fastuda.kernels._common import EPS_KL, on_device, prepare, product
from fastuda.kernels._narrow import WIDEST
from fastuda.kernels._panels import Panel, panel_scale, without_vanishing

TOP = {"cosine": 1.0, "kl": 0.0}
"""The largest possible similarity; the residual ``log_sum`` is relative to it."""


def spatial_aggregate_fwd(
    x: Tensor, similarity: str, contrast: bool, alpha: float, library: bool = False
) -> tuple[Tensor, ...]:
    """``(out, temperature, log_sum, drift)``; the low-level op of the same name. ``library``: use panels
    that the library multiplies, not tiles."""
    if library and len(x) > 1:  # the panels hold one image at a time
        results = [spatial_aggregate_fwd(image, similarity, contrast, alpha, library) for image in x.split(1)]
        return tuple(torch.cat(each) for each in zip(*results, strict=True))
    x = x.contiguous()
    batch, n, c = x.shape
    out = torch.empty_like(x)
    with on_device(x):
        side = prepare(x, similarity)
        if contrast:
            temperature = _temperature.self_temperatures(side, similarity, library)
        else:
            temperature = _temperature.ones(side)
        own = own_similarity(side, similarity)
        total = torch.empty_like(temperature)
        for b in range(batch):
            if similarity == "kl" and c <= WIDEST:
                y, total[b] = mixed(side.query[b], side.key[b], side.row[b], temperature[b])
                out[b] = (y * (alpha / total[b])[:, None]).add_(x[b], alpha=1 - alpha)
                continue
            scratch = Panel(side.query, n, c, n, products=int(library))
            for start in range(0, n, scratch.rows):
                part = slice(start, min(start + scratch.rows, n))
                weights = scratch.view(part.stop - start, n)
                products = scratch.product(side.query[b, part], side.key[b]) if library else None
                total[b, part] = fill_weights(weights, side, b, start, own, temperature, similarity, products)
                y = total.new_empty(part.stop - start, c)
                product(weights, side.query[b], y)
                y *= (alpha / total[b, part])[:, None]
                out[b, part] = y.add_(x[b, part], alpha=1 - alpha)
        log_sum = (own - TOP[similarity]) / temperature + total.log()
        return out, temperature, log_sum, torch.zeros_like(log_sum)


def spatial_aggregate_bwd(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    temperature: Tensor,
    log_sum: Tensor,
    drift: Tensor,
    similarity: str,
    alpha: float,
    library: bool = False,
) -> Tensor:
    """Gradient of the input; the low-level op of the same name. ``drift`` is not read, because the gradient
    of KL needs no sum of the output. ``library`` as in :func:`spatial_aggregate_fwd`, for the cosine."""
    x, grad = x.contiguous(), grad.contiguous()
    batch, _, c = x.shape
    work = x.float() if similarity == "kl" else x
    grad_x = torch.empty_like(x)
    with on_device(x):
        side = prepare(work, similarity)
        own = own_similarity(side, similarity)
        log_sum = log_sum - (own - TOP[similarity]) / temperature
        factor = alpha / temperature * (side.row if similarity == "cosine" else 1.0)
        for b in range(batch):
            g, scale = grad[b].to(work.dtype), None
            vectors = temperature[b], log_sum[b]
            if similarity == "cosine":
                if work.dtype == torch.float16:
                    scale = panel_scale(_largest(g, work[b], factor[b], side.row[b]))
                    g = g * scale
                centre = _centre(g, work[b], out[b], alpha)
                vectors = own[b], *vectors, centre, factor[b]
                symmetric_gradient(side, b, *vectors, g, alpha, scale, library, grad_x[b])
                continue
            centre = g.float() @ work[b].mean(0)
            if c <= WIDEST:
                by_query, by_key, by_values = mixed_gradient(
                    side.query[b], side.key[b], side.row[b], *vectors, g, centre, factor[b]
                )
            else:
                by_query, by_key, by_values = divergence_gradient(side, b, *vectors, g, centre, factor[b])
            by_query += by_key / (work[b] + EPS_KL)
            grad_x[b] = by_query.add_(g, alpha=1 - alpha).add_(by_values, alpha=alpha)
    return grad_x


def _largest(grad: Tensor, values: Tensor, factor: Tensor, inv_norm: Tensor) -> Tensor:
    """[] upper bound of ``grad`` and of the slopes of the cosine, except those of vanishing features:
    ``|w (g_i . x_j - centre_i)| <= |g_i| (|x_j| + max |x|)``."""
    inv = without_vanishing(inv_norm)
    factor = torch.where(inv > 0, factor, 0)
    length = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
    largest = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).amax()
    slope = (length * factor.abs()).amax() * (1 + largest * inv.amax())
    return torch.maximum(slope, grad.abs().amax())


def _centre(grad: Tensor, values: Tensor, out: Tensor, alpha: float) -> Tensor:
    """[N] the weighted mean of ``grad_i . x_j``, computed from the output."""
    if alpha == 0:
        return torch.zeros(len(grad), device=grad.device)
    result = torch.empty(len(grad), device=grad.device)
    for start in range(0, len(grad), 4096):
        rows = slice(start, start + 4096)
        mixed = (out[rows].float() - (1 - alpha) * values[rows].float()) / alpha
        result[rows] = (grad[rows].float() * mixed).sum(1)
    return result
