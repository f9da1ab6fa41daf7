"""Batch norm followed by an activation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._checks import (
    check_beside,
    check_choice,
    check_flag,
    check_float,
    check_positive,
    check_rank,
    check_share,
)
from fastuda.ops._schema import operator, statistic

BOUNDS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
"""What each activation clamps to."""


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> Tensor:
    y = nnf.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if activation == "none":
        return y
    # the gradient of the norm needs its input, not y
    return nnf.relu(y, inplace=True) if activation == "relu" else nnf.relu6(y, inplace=True)


@operator
def batch_norm_act_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return statistic(x, x.shape[1]), statistic(x, x.shape[1])


@operator
def batch_norm_act_fwd(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator
def batch_norm_act_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: float,
    high: float,
    training: bool,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = x.shape
    by_x = x.new_empty(b, h, w, c).permute(0, 3, 1, 2) if for_x else x.new_empty(0)
    return by_x, torch.empty_like(weight), torch.empty_like(bias)


_backends.register("batch_norm_act", triton=True)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor],
        training: bool,
        momentum: float,
        settings: tuple[float, float, float],
        name: str,
    ):
        mean, variance = running
        if training:
            mean, variance = _backends.overload("batch_norm_act_moments", name)(x)
            count = x.numel() // x.shape[1]
            running[0].lerp_(mean, momentum)
            running[1].lerp_(variance * (count / (count - 1)), momentum)
        ctx.save_for_backward(x, mean, variance, weight, bias)
        ctx.settings, ctx.training, ctx.name = settings, training, name
        return _backends.overload("batch_norm_act_fwd", name)(x, mean, variance, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        wanted = ctx.needs_input_grad[:3]
        grads = _backends.overload("batch_norm_act_bwd", ctx.name)(
            grad, *ctx.saved_tensors, *ctx.settings, ctx.training, wanted[0]
        )
        return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * 5)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """``act((x - m) / sqrt(v + eps) * weight + bias)`` per channel, for channels-last features.

    In training ``m`` and ``v`` are the mean and the biased variance over images and pixels, and the running
    statistics move towards ``m`` and the unbiased variance by ``momentum``, in place. In evaluation ``m`` and
    ``v`` are the running statistics. The backward recomputes the activation instead of storing it.

    Source: Ioffe and Szegedy, ICML 2015; ``torch.nn.functional.batch_norm``.

    Args:
        x: [B, C, h, w]; channels-last ones are not copied.
        weight, bias, running_mean, running_var: [C], float32 (float64 beside float64 ``x``).
        training: use the statistics of ``x`` and update the running ones; otherwise use the running ones.
        momentum: in [0, 1].
        eps: added to the variance.
        activation: none, relu or relu6.
        backend: ``auto``, or a name from ``fastuda.ops.backends("batch_norm_act")``.

    Returns:
        [B, C, h, w] in the dtype of ``x``, channels-last.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers do not fit, there is a single pixel to train
            on, or the named backend cannot run.
    """
    _check(x, weight, bias, running_mean, running_var, training, momentum, eps, activation)
    name = _backends.select("batch_norm_act", x, backend=backend)
    if name == "reference":
        return reference(x, weight, bias, running_mean, running_var, training, momentum, eps, activation)
    running, settings = (running_mean, running_var), (eps, *BOUNDS[activation])
    return _BatchNormAct.apply(x, weight, bias, running, training, momentum, settings, name)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> None:
    check_float("x", x)
    check_rank("x", x, "B, C, h, w")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in channels.items():
        check_float(name, value)
        check_beside(name, value, "x", x)
        if tuple(value.shape) != (x.shape[1],):
            raise ValueError(f"{name} must have shape ({x.shape[1]},), got {tuple(value.shape)}")
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} beside {x.dtype} x, got {value.dtype}")
    check_flag("training", training)
    check_share("momentum", momentum)
    check_positive("eps", eps)
    check_choice("activation", activation, tuple(BOUNDS))
    if training and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"training needs more than 1 value per channel, got x of shape {tuple(x.shape)}")
