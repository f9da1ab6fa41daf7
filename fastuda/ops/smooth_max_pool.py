"""Scores of classes in an image: the smooth maximum of their logits over the pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._checks import check_float, check_positive, check_rank, without_autocast
from fastuda.ops._reference import full
from fastuda.ops._schema import operator, statistic


def reference(logits: Tensor, k: float) -> Tensor:
    """``log(mean_hw exp(k z)) / k``."""
    z = full(logits).flatten(2) * k
    return (z.logsumexp(2) - math.log(z.shape[2])) / k


@operator
def smooth_max_pool_fwd(logits: Tensor, k: float) -> tuple[Tensor, Tensor]:
    return statistic(logits, *logits.shape[:2]), statistic(logits, *logits.shape[:2])


@operator
def smooth_max_pool_bwd(grad: Tensor, logits: Tensor, lse: Tensor, k: float) -> Tensor:
    return logits.new_empty(logits.shape)


_backends.register("smooth_max_pool", triton=True)


class _SmoothMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: float, name: str):
        pooled, lse = _backends.overload("smooth_max_pool_fwd", name)(logits, k)
        ctx.save_for_backward(logits, lse)
        ctx.k, ctx.name = k, name
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return (
            _backends.overload("smooth_max_pool_bwd", ctx.name)(grad, *ctx.saved_tensors, ctx.k),
            None,
            None,
        )


def smooth_max_pool(logits: Tensor, *, k: float = 1.0, backend: str = "auto") -> Tensor:
    """``log(mean over pixels of exp(k z)) / k``: between the mean (k to 0) and the maximum (k to infinity).

    Stable in every dtype; the result is at least float32. Source: Paul et al., ECCV 2020, eq. 1.

    Args:
        logits: [B, K, h, w].
        k: positive sharpness; published 1.
        backend: ``auto``, or a name from ``fastuda.ops.backends("smooth_max_pool")``.

    Returns:
        [B, K].

    Raises:
        ValueError, TypeError: a shape, dtype or value does not fit, or the named backend cannot run.
    """
    check_float("logits", logits)
    check_rank("logits", logits, "B, K, h, w")
    check_positive("k", k)
    name = _backends.select("smooth_max_pool", logits, backend=backend)
    with without_autocast(logits):
        if name != "reference":
            return _SmoothMax.apply(logits, k, name)
        return reference(logits, k)
