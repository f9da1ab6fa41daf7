"""Features of classes in an image: means of the pixels' features, weighted by each class's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._autograd import wanted_gradients
from fastuda.ops._checks import check_beside, check_float, check_rank, without_autocast
from fastuda.ops._reference import full
from fastuda.ops._schema import operator, statistic


def reference(features: Tensor, logits: Tensor) -> Tensor:
    """``[B, K, C]``: the mean of the features, weighted by each class's softmax over the pixels."""
    features = full(features)
    return logits.to(features.dtype).softmax(1).transpose(1, 2) @ features


@operator
def category_pool_fwd(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    (b, _, c), k = features.shape, logits.shape[2]
    return statistic(features, b, k, c), statistic(features, b, k)


@operator
def category_pool_bwd(
    grad: Tensor,
    features: Tensor,
    logits: Tensor,
    pooled: Tensor,
    lse: Tensor,
    for_features: bool,
    for_logits: bool,
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if for_features else (0,)),
        logits.new_empty(logits.shape if for_logits else (0,)),
    )


_backends.register("category_pool", triton=True)


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
        return (*wanted_gradients(ctx, "category_pool_bwd", grad, *ctx.saved_tensors), None)


def category_pool(features: Tensor, logits: Tensor, *, backend: str = "auto") -> Tensor:
    """``F_k = sum_i softmax_i(z_ik) f_i``: features weighted by each class's attention over the pixels.

    Source: Paul et al., ECCV 2020, eq. 3 (the paper detaches the attention; to do the same, detach
    ``logits``).

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
        return reference(features, logits)
