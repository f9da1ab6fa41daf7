"""Parts of ``autograd.Function`` that several ops share."""

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


def wanted_gradients(ctx: Any, operator: str, *args: Any) -> list[Tensor | None]:
    """The gradients of the first two inputs, as ``operator(*args, wanted, wanted)`` computes them; None for
    an input that needs no gradient."""
    wanted = ctx.needs_input_grad[:2]
    if not any(wanted):
        return [None, None]
    grads = _backends.overload(operator, ctx.name)(*args, *wanted)
    return [grad if needed else None for grad, needed in zip(grads, wanted, strict=True)]
