"""Contrast-normalised softmax of given rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._checks import check_float, check_positive, without_autocast
from fastuda.ops._reference import full
from fastuda.ops._schema import operator, statistic


def reference(x: Tensor, eps: float) -> Tensor:
    """``softmax((x - mean) / (std + eps))`` along the last axis, mean and unbiased std detached."""
    rows = full(x)
    several = rows.shape[-1] > 1 and rows.numel()
    std = rows.detach().std(-1, keepdim=True) if several else torch.zeros_like(rows[..., :1])
    return ((rows - rows.detach().mean(-1, keepdim=True)) / (std + eps)).softmax(-1).to(x.dtype)


@operator
def contrast_softmax_fwd(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), statistic(x, *x.shape[:-1])


@operator
def contrast_softmax_bwd(grad: Tensor, y: Tensor, inv_std: Tensor) -> Tensor:
    return y.new_empty(y.shape)


_backends.register("contrast_softmax", triton=True)


class _ContrastSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, name: str):
        y, inv_std = _backends.overload("contrast_softmax_fwd", name)(x, eps)
        ctx.save_for_backward(y, inv_std)
        ctx.name = name
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        y, inv_std = ctx.saved_tensors
        return _backends.overload("contrast_softmax_bwd", ctx.name)(grad.contiguous(), y, inv_std), None, None


def contrast_softmax(x: Tensor, *, eps: float = 1e-10, backend: str = "auto") -> Tensor:
    """``softmax((x - mean) / (std + eps))`` along the last axis, mean and unbiased std detached.

    Softmax is invariant to the mean, so this is a softmax with the temperature ``std + eps`` per row.
    Statistics are float32 (float64 for float64). A row of one element gives 1.

    Source: Kang et al., Pixel-Level Cycle Association, NeurIPS 2020, eq. 5 and 6.

    Args:
        x: [..., M] float32, bfloat16, float16 or float64.
        eps: added to the standard deviation; positive, so that a constant row has a finite softmax.
        backend: ``auto``, or a name from ``fastuda.ops.backends("contrast_softmax")``.

    Returns:
        [..., M] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape, dtype or value does not fit, or the named backend cannot run.
    """
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., M] with M > 0, got shape {tuple(x.shape)}")
    check_positive("eps", eps)
    name = _backends.select("contrast_softmax", x, backend=backend)
    with without_autocast(x):
        if name == "reference":
            return reference(x, eps)
        return _ContrastSoftmax.apply(x, eps, name)
