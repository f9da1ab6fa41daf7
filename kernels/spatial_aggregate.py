"""Spatial aggregation in row panels: a fused kernel makes the weights, library products consume them in L2.

No log-sum-exp pass comes first: a pixel is its own best match, so the largest similarity of a row is known
beforehand, and the sums are taken on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.kernels import _temperature
from fastuda.kernels._aggregate_gradient import fill_slopes
from fastuda.kernels._aggregate_symmetric import symmetric_gradient
from fastuda.kernels._aggregate_weights import fill_weights, own_similarity
from fastuda.kernels._common import EPS_KL, add_product, on_device, prepare, product
from fastuda.kernels._narrow import WIDEST, mixed, mixed_gradient
from fastuda.kernels._panels import Panel, panel_scale, project, without_vanishing


def aggregate_fwd(
    x: Tensor, similarity: str, contrast: bool, alpha: float, library: bool = False
) -> tuple[Tensor, ...]:
    """``(out, temperature, lse)``; the low-level op of the same name. ``library``: panels that the library
    multiplies in place of tiles."""
    if library and len(x) > 1:  # its panels are of one image
        results = [aggregate_fwd(image, similarity, contrast, alpha, library) for image in x.split(1)]
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
        return out, temperature, own / temperature + total.log()


def aggregate_bwd(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    temperature: Tensor,
    lse: Tensor,
    similarity: str,
    alpha: float,
    library: bool = False,
) -> Tensor:
    """Gradient of the input; the low-level op of the same name. ``library`` as in :func:`aggregate_fwd`,
    of the cosine."""
    x, grad = x.contiguous(), grad.contiguous()
    batch, n, c = x.shape
    work = x.float() if similarity == "kl" else x
    grad_x = torch.empty_like(x)
    with on_device(x):
        side = prepare(work, similarity)
        own = own_similarity(side, similarity)
        log_sum = lse - own / temperature
        factor = alpha / temperature * (side.row if similarity == "cosine" else 1.0)
        for b in range(batch):
            values, g = work[b], grad[b].to(work.dtype)
            centre = _centre(g, values, out[b], alpha, similarity)
            if similarity == "kl" and c <= WIDEST:
                vectors = side.row[b], temperature[b], log_sum[b]
                by_query, by_key, by_values = mixed_gradient(
                    side.query[b], side.key[b], *vectors, g, centre, factor[b]
                )
                by_query += by_key / (values + EPS_KL)
                grad_x[b] = by_query.add_(g, alpha=1 - alpha).add_(by_values, alpha=alpha)
                continue
            step, scale = factor[b], None
            if work.dtype == torch.float16:
                scale = panel_scale(_largest_slope(g, values, step, side.row[b]))
                step = step * scale
            if library and similarity == "cosine":
                vectors = own[b], temperature[b], log_sum[b], centre, step
                symmetric_gradient(side, b, *vectors, g, alpha, scale, grad_x[b])
                continue
            by_similarity, by_values = own.new_zeros(2, n, c)
            by_query = by_similarity if similarity == "cosine" else torch.zeros_like(by_values)
            scratch = Panel(values, n, c, n, count=2)
            for start in range(0, n, scratch.rows):
                part = slice(start, min(start + scratch.rows, n))
                weights, slopes = (scratch.view(part.stop - start, n, i) for i in (0, 1))
                fill_slopes(
                    weights,
                    slopes,
                    side,
                    b,
                    start,
                    own,
                    temperature,
                    log_sum,
                    g,
                    values,
                    centre,
                    step,
                    similarity,
                )
                add_product(by_values, weights.T, g[part])
                add_product(by_similarity, slopes.T, values[part])
                add_product(by_query[part], slopes, side.key[b])
            rest = (g, by_values, alpha)
            if similarity == "cosine":
                project(by_similarity, values, side.row[b], grad_x[b], scale, rest)
            else:
                by_query += by_similarity / (values + EPS_KL)
                grad_x[b] = by_query.add_(g, alpha=1 - alpha).add_(by_values, alpha=alpha)
    return grad_x


def _largest_slope(grad: Tensor, values: Tensor, factor: Tensor, inv_norm: Tensor) -> Tensor:
    """[] what no slope of the cosine exceeds, but for those of vanishing features:
    ``|w (g_i . x_j - centre_i)| <= |g_i| (|x_j| + max |x|)``."""
    inv = without_vanishing(inv_norm)
    factor = torch.where(inv > 0, factor, 0)
    length = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
    largest = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).amax()
    return (length * factor.abs()).amax() * (1 + largest * inv.amax())


def _centre(grad: Tensor, values: Tensor, out: Tensor, alpha: float, similarity: str) -> Tensor:
    """[N] for :func:`fill_slopes`: the weighted mean of ``grad_i . x_j``, which the output holds; for KL
    the plain mean."""
    if similarity == "kl" or alpha == 0:
        return grad.float() @ values.float().mean(0)
    result = torch.empty(len(grad), device=grad.device)
    for start in range(0, len(grad), 4096):
        rows = slice(start, start + 4096)
        mixed = (out[rows].float() - (1 - alpha) * values[rows].float()) / alpha
        result[rows] = (grad[rows].float() * mixed).sum(1)
    return result
