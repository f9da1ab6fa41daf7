"""Spatial aggregation: self-attention whose similarity is the cosine or minus the KL divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._checks import (
    check_choice,
    check_flag,
    check_float,
    check_rank,
    check_share,
    without_autocast,
)
from fastuda.ops._reference import full, pair_similarity, row_temperature
from fastuda.ops._schema import operator, statistic
from fastuda.ops.cycle_match import SIMILARITIES


def reference(x: Tensor, alpha: float, similarity: str, contrast: bool) -> Tensor:
    """``(1 - alpha) x + alpha softmax(sim(x, x) / t) x`` with raw values and the pixel itself included."""
    sim = pair_similarity(x, x, similarity)
    weights = (sim / row_temperature(sim, contrast)).softmax(-1)
    return ((1 - alpha) * full(x) + alpha * (weights @ full(x))).to(x.dtype)


@operator
def spatial_aggregate_fwd(
    x: Tensor, similarity: str, contrast: bool, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, n, _ = x.shape
    # the output; t_i; log sum_j exp((D_ij - top) / t_i) with top = 1 (KL: 0); and the part of the sum over an
    # output's channels that rounding to its dtype removed, or 0 where it is not known
    return x.new_empty(x.shape), statistic(x, b, n), statistic(x, b, n), statistic(x, b, n)


@operator
def spatial_aggregate_bwd(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    temperature: Tensor,
    log_sum: Tensor,
    drift: Tensor,
    similarity: str,
    alpha: float,
) -> Tensor:
    return x.new_empty(x.shape)


_backends.register("spatial_aggregate", triton=True, library_channels=512)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, similarity: str, contrast: bool, alpha: float, name: str):
        out, *residuals = _backends.overload("spatial_aggregate_fwd", name)(x, similarity, contrast, alpha)
        ctx.save_for_backward(x, out, *residuals)
        ctx.similarity, ctx.alpha, ctx.name = similarity, alpha, name
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        bwd = _backends.overload("spatial_aggregate_bwd", ctx.name)
        grad_x = bwd(grad.contiguous(), *ctx.saved_tensors, ctx.similarity, ctx.alpha)
        return grad_x, None, None, None, None


def spatial_aggregate(
    x: Tensor,
    *,
    alpha: float = 0.5,
    similarity: str = "cosine",
    contrast: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Mix every pixel with the softmax-weighted sum of all pixels of its image.

        out_i = (1 - alpha) x_i + alpha sum_j softmax_j(D(x_i, x_j) / t_i) x_j

    With ``contrast=True``, ``t_i`` is the detached unbiased standard deviation of row ``i`` plus 1e-10.
    Otherwise it is 1. It is also 1 for an image of one pixel, and where the deviation is only rounding (at
    most 8 eps times the larger of the row's mean and 1), so that equal similarities give equal weights. The
    values are the raw rows, the pixel itself included. The gradient flows through the weights and the values.

    Source: Kang et al., Pixel-Level Cycle Association, NeurIPS 2020, eq. 7 and 8. The authors' code uses
        ``contrast=False`` for ``kl``.

    Args:
        x: [B, N, C] features (``cosine``) or probabilities (``kl``); float32, bfloat16, float16 or float64.
        alpha: share of the aggregated part, in [0, 1].
        similarity: ``cosine``, or ``kl`` for ``-KL(x_i || x_j)``.
        contrast: use the standard deviations of the rows as temperatures.
        backend: ``auto``, or a name from ``fastuda.ops.backends("spatial_aggregate")``.

    Returns:
        [B, N, C] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape, dtype or value does not fit, or the named backend cannot run.
    """
    check_float("x", x)
    check_rank("x", x, "B, N, C")
    check_share("alpha", alpha)
    check_choice("similarity", similarity, SIMILARITIES)
    check_flag("contrast", contrast)
    name = _backends.select("spatial_aggregate", x, backend=backend)
    with without_autocast(x):
        if name == "reference":
            return reference(x, alpha, similarity, contrast)
        return _Aggregate.apply(x, similarity, contrast, alpha, name)
