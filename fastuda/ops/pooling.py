"""WeakSegDA's pooling of scores and of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends, reference_losses
from fastuda.ops._checks import check_beside, check_float, check_positive, check_rank, without_autocast

_backends.register("smooth_max_pool", ("smooth_max_pool_fwd", "smooth_max_pool_bwd"), triton=True)
_backends.register("category_pool", ("category_pool_fwd", "category_pool_bwd"), triton=True)


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


class _CategoryPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, logits: Tensor, name: str):
        pooled, lse = _backends.overload("category_pool_fwd", name)(features, logits)
        ctx.save_for_backward(features, logits, pooled, lse)
        ctx.name = name
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        wanted = ctx.needs_input_grad[:2]
        found = _backends.overload("category_pool_bwd", ctx.name)(grad, *ctx.saved_tensors, *wanted)
        return (*(x if needed else None for x, needed in zip(found, wanted, strict=True)), None)


def smooth_max_pool(logits: Tensor, *, k: float = 1.0, backend: str = "auto") -> Tensor:
    """``log(mean over pixels of exp(k z)) / k``: between the mean (k to 0) and the maximum (k to infinity).

    Stable in every dtype; the result is float32 at least. Source: Paul et al., ECCV 2020, eq. 1.

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
        return reference_losses.smooth_max_pool(logits, k)


def category_pool(features: Tensor, logits: Tensor, *, backend: str = "auto") -> Tensor:
    """``F_k = sum_i softmax_i(z_ik) f_i``: features under each class's attention over the pixels.

    Source: Paul et al., ECCV 2020, eq. 3 (there the attention is detached: detach ``logits``).

    Args:
        features: [B, N, C].
        logits: [B, N, K].
        backend: ``auto``, or a name from ``fastuda.ops.backends("category_pool")``.

    Returns:
        [B, K, C], float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or the named backend cannot run.
    """
    for name, x, shape in (("features", features, "B, N, C"), ("logits", logits, "B, N, K")):
        check_float(name, x)
        check_rank(name, x, shape)
    check_beside("logits", logits, "features", features)
    if features.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"features {tuple(features.shape)} and logits {tuple(logits.shape)} must share batch and pixels"
        )
    name = _backends.select("category_pool", features, logits, backend=backend)
    with without_autocast(features):
        if name != "reference":
            return _CategoryPool.apply(features, logits, name)
        return reference_losses.category_pool(features, logits)
