"""Depthwise convolution with stride and dilation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._autograd import wanted_gradients
from fastuda.ops._checks import check_beside, check_float, check_integer, check_rank, without_autocast
from fastuda.ops._reference import full
from fastuda.ops._schema import operator


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
) -> Tensor:
    """A convolution of every channel with its own kernel.

    Computes in float32 on a CPU: torch's weight gradient of a dilated convolution in bfloat16, channels last,
    is wrong (2.13).
    """
    dtype = full(x).dtype if x.device.type == "cpu" else x.dtype
    added = bias if bias is None else bias.to(dtype)
    y = nnf.conv2d(x.to(dtype), weight.to(dtype), added, stride, padding, dilation, x.shape[1])
    return y.to(x.dtype)


@operator
def depthwise_conv2d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
) -> Tensor:
    b, c, *size = x.shape
    h, w = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(size, weight.shape[2:], strict=True)
    )
    shape = (b, c, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator
def depthwise_conv2d_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    b, c, h, w = x.shape
    by_x = x.new_empty(b, h, w, c).permute(0, 3, 1, 2) if for_x else x.new_empty(0)
    return by_x, weight.new_empty(weight.shape if for_weight else (0,))


_backends.register("depthwise_conv2d", triton=True)


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
        x, weight = ctx.saved_tensors
        grads = wanted_gradients(ctx, "depthwise_conv2d_bwd", grad, x, weight, *ctx.settings)
        bias = grad.sum((0, 2, 3), dtype=weight.dtype) if ctx.needs_input_grad[2] else None
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

    Sums are at least float32; the result has the dtype of ``x``. Under autocast ``x`` is cast as a
    convolution casts it.

    Args:
        x: [B, C, h, w]; channels-last ones are not copied.
        weight: [C, 1, kh, kw]; may be float32 with ``x`` in half precision.
        bias: [C], or none.
        stride: of both axes, at least 1.
        padding: zeros on every side.
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
            return reference(x, weight, bias, stride, padding, dilation)
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
