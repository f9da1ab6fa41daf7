"""Depthwise convolution with stride and dilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends, reference
from fastuda.ops._checks import check_beside, check_float, check_integer, check_rank, without_autocast

_backends.register(
    "depthwise_conv2d", ("depthwise_conv2d_fwd", "depthwise_conv2d_bwd"), triton=True, cuda=False
)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[int, int, int], name: str
    ):
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.name = settings, name
        return _backends.overload("depthwise_conv2d_fwd", name)(x, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        by_x, by_weight, by_bias = ctx.needs_input_grad[:3]
        x, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        if by_x or by_weight:
            operator = _backends.overload("depthwise_conv2d_bwd", ctx.name)
            gradients = operator(grad, x, weight, *ctx.settings, by_x, by_weight)
            grads = [y if needed else None for y, needed in zip(gradients, (by_x, by_weight), strict=True)]
        bias = grad.sum((0, 2, 3), dtype=weight.dtype) if by_bias else None
        return (*grads, bias, None, None)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """``torch.nn.functional.conv2d`` with as many groups as channels, for channels-last features.

    Sums are float32 at least, the result has the dtype of ``x``. Under autocast ``x`` is cast as a
    convolution casts it.

    Args:
        x: [B, C, h, w]; channels-last ones are not copied.
        weight: [C, 1, kh, kw]; a float32 one may meet ``x`` in half precision.
        bias: [C], or none.
        stride: of both axes, at least 1.
        padding: zeros at every side.
        dilation: at least 1.
        backend: ``auto``, or a name from ``fastuda.ops.backends("depthwise_conv2d")``.

    Returns:
        [B, C, h', w'], channels-last, ``h' = (h + 2 padding - dilation (kh - 1) - 1) // stride + 1``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers do not fit, or the named backend cannot run.
    """
    _check(x, weight, bias, stride, padding, dilation)
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    name = _backends.select("depthwise_conv2d", x, backend=backend)
    with without_autocast(x):
        if name == "reference":
            return reference.depthwise_conv2d(x, weight, bias, stride, padding, dilation)
        return _DepthwiseConv2d.apply(x, weight, bias, (stride, padding, dilation), name)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> None:
    for name, value, shape in (("x", x, "B, C, h, w"), ("weight", weight, "C, 1, kh, kw")):
        check_float(name, value)
        check_rank(name, value, shape)
    check_beside("weight", weight, "x", x)
    if weight.shape[:2] != (x.shape[1], 1):
        raise ValueError(
            f"weight must be [{x.shape[1]}, 1, kh, kw], got {tuple(weight.shape)}: x is {tuple(x.shape)}"
        )
    if bias is not None:
        check_float("bias", bias)
        check_beside("bias", bias, "x", x)
        if tuple(bias.shape) != (x.shape[1],):
            raise ValueError(f"bias must have shape ({x.shape[1]},), got {tuple(bias.shape)}")
    for name, number, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        check_integer(name, number, least)
    for axis in (2, 3):
        if x.shape[axis] + 2 * padding < dilation * (weight.shape[axis] - 1) + 1:
            raise ValueError(
                f"the kernel of {tuple(weight.shape[2:])} with dilation {dilation} is larger than x"
                f" {tuple(x.shape)} with padding {padding}"
            )
