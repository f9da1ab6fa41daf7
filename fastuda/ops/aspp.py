"""DeepLab's head: the sum of dilated convolutions of the same features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._autograd import wanted_gradients
from fastuda.ops._checks import check_beside, check_float, check_integer, check_rank, without_autocast
from fastuda.ops._schema import operator


def reference(
    features: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], biases: Sequence[Tensor] | None
) -> Tensor:
    """DeepLab's head: the sum of one dilated 3x3 convolution per branch."""
    dtype = features.dtype
    branches = zip(weights, dilations, strict=True)
    outputs = [nnf.conv2d(features, w.to(dtype), padding=d, dilation=d) for w, d in branches]
    outputs += [b.to(dtype)[:, None, None] for b in biases or ()]
    return sum(outputs[1:], outputs[0])


@operator
def aspp_fwd(features: Tensor, weight: Tensor, bias: Tensor | None, dilations: list[int]) -> Tensor:
    b, _, h, w = features.shape
    layout = suggest_memory_format(features)
    shape = (b, weight.shape[3], h, w)
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=layout)


@operator
def aspp_bwd(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    dilations: list[int],
    for_features: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    b, c, h, w = features.shape
    by_features = (
        features.new_empty(b, h, w, c).permute(0, 3, 1, 2) if for_features else features.new_empty(0)
    )
    return by_features, weight.new_empty(weight.shape if for_weight else (0,))


_backends.register("aspp", triton=True)


class _ASPP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, dilations: list[int], name: str
    ):
        ctx.save_for_backward(features, weight)
        ctx.dilations, ctx.name = dilations, name
        return _backends.overload("aspp_fwd", name)(features, weight, bias, dilations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        features, weight = ctx.saved_tensors
        grads = wanted_gradients(ctx, "aspp_bwd", grad, features, weight, ctx.dilations)
        bias = grad.sum((0, 2, 3), dtype=weight.dtype) if ctx.needs_input_grad[2] else None
        return (*grads, bias, None, None)


def aspp(
    features: Tensor,
    weights: Sequence[Tensor],
    *,
    dilations: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """``sum_r conv3x3(features, weights[r], dilation dilations[r])``, padded to keep the size.

    Every tap of every branch is a product with the same features, so one pass over them is enough. Sums are
    at least float32; the result has the dtype of the features. Under autocast the features are cast as a
    convolution casts them.

    Source: the head of Chen et al., DeepLab, TPAMI 2018 (atrous spatial pyramid pooling, summed).

    Args:
        features: [B, C, h, w]; channels-last ones are not copied.
        weights: [K, C, 3, 3] for each branch; may be float32 with features in half precision.
        dilations: one for each branch, at least 1; a tap that is entirely outside the image costs nothing.
        biases: [K] for each branch, or none.
        backend: ``auto``, or a name from ``fastuda.ops.backends("aspp")``.

    Returns:
        [B, K, h, w], channels-last where the features are.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or the named backend cannot run.
    """
    _check(features, weights, dilations, biases)
    kind = features.device.type
    if not features.is_meta and torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        features = features.to(torch.get_autocast_dtype(kind))
    name = _backends.select("aspp", features, backend=backend)
    with without_autocast(features):
        if name == "reference":
            return reference(features, weights, dilations, biases)
        # [branches, 3, 3, K, C]: channels-last weights are copied in runs of C
        weight = torch.stack([w.permute(2, 3, 0, 1) for w in weights])
        bias = None if biases is None else sum(biases[1:], biases[0])
        return _ASPP.apply(features, weight, bias, list(dilations), name)


def _check(
    features: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], biases: Sequence[Tensor] | None
) -> None:
    check_float("features", features)
    check_rank("features", features, "B, C, h, w")
    lists = {"weights": weights, "dilations": dilations, "biases": weights if biases is None else biases}
    for what, given in lists.items():
        if not isinstance(given, list | tuple):
            raise TypeError(
                f"{what} must be a list with an entry for each branch, got {type(given).__name__}"
            )
        if not given:
            raise ValueError(f"{what} has no branch, at least 1 is needed")
        if len(given) != len(weights):
            raise ValueError(f"{what} is of {len(given)} branches, weights of {len(weights)}")
    for r, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        name = f"weights[{r}]"
        check_float(name, weight)
        check_beside(name, weight, "features", features)
        shape = (weights[0].shape[0] if weights[0].dim() else 0, features.shape[1], 3, 3)
        if tuple(weight.shape) != shape or not shape[0]:
            raise ValueError(
                f"{name} must be [K, {shape[1]}, 3, 3] with one K of all branches, got shape"
                f" {tuple(weight.shape)}"
            )
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"{name} is {weight.dtype}, weights[0] {weights[0].dtype}: give them one dtype")
        check_integer(f"dilations[{r}]", dilation, 1)
    for r, bias in enumerate(biases or ()):
        check_float(f"biases[{r}]", bias)
        check_beside(f"biases[{r}]", bias, "features", features)
        if tuple(bias.shape) != (weights[0].shape[0],):
            raise ValueError(
                f"biases[{r}] must have shape ({weights[0].shape[0]},), got {tuple(bias.shape)}:"
                f" weights[0] is {tuple(weights[0].shape)}"
            )
