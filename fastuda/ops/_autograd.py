"""What the losses share whose forward finds their gradient in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends


class GradientInForward(torch.autograd.Function):
    """``operator(x, *rest, wanted) -> (scalar, its gradient by x)``: the backward only scales it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...], operator: str, name: str):
        value, grad = _backends.overload(operator, name)(x, *rest, ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        ctx.dtype = x.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad * grad_value).to(ctx.dtype), None, None, None
